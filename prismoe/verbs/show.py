"""`show`: describe what a path names."""

from __future__ import annotations

from typing import Any

from prismoe.errors import UsageError
from prismoe.verbs.job import Job

__all__ = ["show"]


def show(job: Job) -> dict[str, Any]:
    from prismoe import show as pages

    if job.subject is None:
        raise UsageError("nothing to show", needed="a run folder, a model, a plan, a domain or a config")
    found: dict[str, Any] = pages.describe(job.subject, offline=job.flags.offline)
    pages.show(job.screen, found)
    return found
