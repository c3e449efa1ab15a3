"""`train-filter`: a linear filter from labelled texts, for `data.filters`."""

from __future__ import annotations

from typing import Any

from prismoe.errors import UsageError
from prismoe.verbs.job import Job

__all__ = ["train_filter"]


def train_filter(job: Job) -> dict[str, Any]:
    """From a file of texts to keep and one of texts to drop."""
    from prismoe import views
    from prismoe.config.options import TrainFilterOptions, read_options
    from prismoe.data.filters import linear

    options = read_options(TrainFilterOptions, job.overrides)
    if job.flags.out is None:
        raise UsageError("out is not set", where="train-filter", needed="--out FOLDER")
    receipt = linear.train_filter(
        options.keep, options.drop, out=job.flags.out, seed=job.flags.seed or 0, force=job.flags.force
    ).to_dict()
    views.view(job.screen, "train-filter", receipt)
    return receipt
