"""`tune`: a model folder in, a tuned one out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError
from prismoe.verbs.job import Job

if TYPE_CHECKING:
    from prismoe.config import Config

__all__ = ["tune"]


def tune(job: Job) -> dict[str, Any]:
    """The model is the config's `source` (a mixture of this or another project, or a dense model)."""
    from prismoe import views
    from prismoe.tune import tune as tune_model

    config, flags = job.config(), job.flags
    with job.screen.progress() as on_progress:
        receipt = tune_model(
            _source(config),
            config.need("tune"),
            out=config.need("out"),
            force=flags.force,
            dry_run=flags.dry_run,
            offline=flags.offline,
            on_progress=on_progress,
        ).to_dict()
    views.view(job.screen, "tune", receipt)
    for warning in receipt["warnings"]:
        job.screen.warning(warning)
    return receipt


def _source(config: Config) -> str:
    """The model's folder; where it is a run's that has not been, the error says which command makes it."""
    source = str(config.need("source"))
    run, _, inside = source.partition("/train/")
    if inside != "model" or Path(source).exists():
        return source
    beside = sorted(Path(config.place("")).parent.glob("*.yaml"))  # of the shipped ones, the run's own stands there
    of_run = re.compile(rf"^out: *{re.escape(run)} *(#.*)?$", re.MULTILINE)
    made_by = next(
        (str(path) for path in beside if of_run.search(path.read_text(errors="replace"))), f"CONFIG --out {run}"
    )
    hint = f"prismoe run {made_by} makes it"
    raise InputError("no such folder", where=config.place("source"), needed=source, hint=hint)
