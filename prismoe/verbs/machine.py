"""The verbs about this machine: `doctor` looks at it, `demo` tries it out."""

from __future__ import annotations

import tempfile
from typing import Any

from prismoe.verbs.job import Job

__all__ = ["demo", "doctor"]


def doctor(job: Job) -> dict[str, Any]:
    from prismoe.doctor import doctor

    picture = doctor()
    for name, facts in picture.sections.items():
        job.screen.title(name)
        job.screen.pairs(facts)
    for warning in picture.warnings:
        job.screen.warning(warning)
    return picture.to_dict()


def demo(job: Job) -> dict[str, Any]:
    from prismoe.demo import demo

    out, seed = job.flags.out or "runs/demo", job.flags.seed
    overrides = job.overrides if seed is None else (*job.overrides, f"seed={seed}")
    if job.flags.dry_run:  # its text and config are written to be checked, and leave no trace
        with tempfile.TemporaryDirectory() as scratch:
            return demo(job.screen, out=scratch, overrides=overrides, dry_run=True)
    return demo(job.screen, out=out, overrides=overrides, force=job.flags.force)
