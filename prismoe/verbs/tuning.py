"""`tune`: a model folder in, a tuned one out."""

from __future__ import annotations

from typing import Any

from prismoe.verbs.job import Job

__all__ = ["tune"]


def tune(job: Job) -> dict[str, Any]:
    """The model is the config's `source` (a mixture of this or another project, or a dense model)."""
    from prismoe import views
    from prismoe.tune import tune as tune_model

    config, flags = job.config(), job.flags
    with job.screen.progress() as on_progress:
        receipt = tune_model(
            config.need("source"),
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
