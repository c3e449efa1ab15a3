"""`show`: describe what a path names."""

from __future__ import annotations

from typing import Any

from prismoe.errors import UsageError
from prismoe.verbs.job import Job

__all__ = ["show"]


def show(job: Job) -> dict[str, Any]:
    from prismoe import show as pages
    from prismoe.config.options import ShowOptions, read_options

    options = read_options(ShowOptions, job.overrides)
    if job.subject is None:
        raise UsageError("nothing to show", needed="a run folder, a model, a plan, a domain or a config")
    with job.screen.progress() as on_progress:
        found: dict[str, Any] = pages.describe(
            job.subject,
            calibration=options.calibration,
            picture=job.flags.out,
            draw=not (job.flags.json or job.flags.dry_run),
            offline=job.flags.offline,
            on_progress=on_progress,
        )
    pages.show(job.screen, found)
    return found
