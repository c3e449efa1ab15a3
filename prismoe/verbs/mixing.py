"""The verb that measures what mixing rules need: `reference-loss`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prismoe.verbs.job import Job

__all__ = ["reference_loss"]


def reference_loss(job: Job) -> dict[str, Any]:
    from prismoe import views
    from prismoe.config.options import ReferenceOptions, read_options
    from prismoe.reference import find_domains
    from prismoe.reference import reference_loss as measure

    options = read_options(ReferenceOptions, job.overrides)
    model, out = job.source_and_out("a model folder, and a folder of prepared domains")
    with job.screen.progress() as on_progress:
        receipt = measure(
            model,
            find_domains(job.second("a folder of prepared domains")),
            out=out,
            offline=job.flags.offline,
            on_progress=on_progress,
            **asdict(options),
        ).to_dict()
    views.view(job.screen, "reference-loss", {**receipt, "out": out})
    return receipt
