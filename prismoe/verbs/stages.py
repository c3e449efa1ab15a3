"""The verbs that are a stage of a run, and `plan` and `verify`, which can do more than their stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from prismoe.errors import InputError
from prismoe.verbs.job import Job

__all__ = ["plan", "prepare", "stages", "verify"]


def stages(job: Job) -> dict[str, Any]:
    """A verb that is one stage of a run, or all of them."""
    from prismoe import views
    from prismoe.progress import quiet
    from prismoe.run import Done, run
    from prismoe.train.engine.layout import launched

    config = job.config()
    several = job.verb == "run"

    def show(done: Done) -> None:
        if launched()[0]:
            return  # one of several processes speaks for all
        if several:
            job.screen.stage(done.stage, done.state, views.summary(done.stage, done.receipt), done.seconds)
        elif done.stage == job.verb:
            views.view(job.screen, done.stage, done.receipt)
        for warning in done.receipt.get("warnings", ()) if several or done.stage == job.verb else ():
            job.screen.warning(f"{done.stage}: {warning}")

    with job.screen.progress() as on_progress:
        result = run(
            config,
            stages=None if several else (job.verb,),
            dry_run=job.flags.dry_run,
            force=job.flags.force,
            offline=job.flags.offline,
            on_progress=quiet if launched()[0] else on_progress,
            on_stage=show,
        )
    if several and not job.flags.dry_run and result.stages[-1].stage != "report":
        job.screen.warning("report: not written, jinja2 or matplotlib is missing: pip install 'prismoe[report]'")
    if several and "eval" in (receipts := {done.stage: done.receipt for done in result.stages}):
        views.view(job.screen, "eval", receipts["eval"])
    if not result.stages:
        job.screen.note(f"{job.verb}: the config is right; there is nothing else to check before the work itself")
    return result.to_dict() if several or not result.stages else result.of(job.verb)


def prepare(job: Job) -> dict[str, Any]:
    """The stage, or with `--part` one share of it, which leaves the run's state alone."""
    if job.flags.part is None:
        return stages(job)
    from prismoe import views
    from prismoe.errors import UsageError
    from prismoe.run import run_folder
    from prismoe.run.stages import Work
    from prismoe.run.texts import prepare_part

    part = re.fullmatch(r"(\d{1,9})/(\d{1,9})", job.flags.part)
    if part is None:
        raise UsageError(f"--part {job.flags.part}", needed="I/N, for instance 3/64")
    config, flags = job.config(), job.flags
    config.need("data")
    if not flags.dry_run:
        run_folder(Path(config.need("out")))
    with job.screen.progress() as on_progress:
        work = Work(config, dry_run=flags.dry_run, force=flags.force, offline=flags.offline, on_progress=on_progress)
        receipt = prepare_part(work, (int(part[1]), int(part[2])))
    views.view(job.screen, "prepare", receipt)
    return receipt


def verify(job: Job) -> dict[str, Any]:
    """A run's mixture, or any folder that `convert` wrote."""
    from prismoe import views
    from prismoe.folder import Manifest

    manifest = Manifest.read(Path(job.subject)) if job.subject and Path(job.subject).is_dir() else None
    if job.subject is None or manifest is None or manifest.kind != "convert":
        is_run = (
            job.subject is None or job.subject.endswith((".yaml", ".yml")) or (Path(job.subject) / "run.yaml").is_file()
        )
        if not is_run and job.flags.out is None:
            raise InputError(
                "nothing to verify",
                where=str(job.subject),
                needed="a config, a run folder or a folder that convert wrote",
            )
        return stages(job)
    from prismoe.config import load_config
    from prismoe.verify import verify

    config = load_config(overrides=job.overrides)
    with job.screen.progress() as on_progress:
        certificate = verify(
            job.subject,
            source=config.source,
            branches=config.plan.arguments.get("branches"),
            tokens=config.verify.tokens,
            force=job.flags.force,
            offline=job.flags.offline,
            on_progress=on_progress,
        ).to_dict()
    views.view(job.screen, "verify", certificate)
    for warning in certificate["warnings"]:
        job.screen.warning(warning)
    return certificate


def plan(job: Job) -> dict[str, Any]:
    """Make a plan, or hold two against each other."""
    if job.flags.compare is None:
        return stages(job)
    from prismoe.plan.compare import compare_plans
    from prismoe.show import show_comparison

    found = compare_plans(*job.flags.compare).to_dict()
    show_comparison(job.screen, found)
    return found
