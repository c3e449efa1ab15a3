"""`show`: describe what a path names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import UsageError
from prismoe.verbs.job import Job

if TYPE_CHECKING:
    from prismoe.config.options import ShowOptions

__all__ = ["show"]


def show(job: Job) -> dict[str, Any]:
    from prismoe import show as pages
    from prismoe.config.options import ShowOptions, read_options

    options = read_options(ShowOptions, job.overrides)
    if job.subject is None:
        raise UsageError("nothing to show", needed="a run folder, a model, a plan, a domain or a config")
    if (mixed := _mixture(job, options)) is not None:
        return mixed
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


def _mixture(job: Job, options: ShowOptions) -> dict[str, Any] | None:
    """A folder of prepared domains or of a finished training run; None for anything else."""
    from prismoe.folder import Manifest

    path = Path(job.subject or "")
    if not path.is_dir():
        return None
    manifest = Manifest.read(path)
    if manifest is not None and manifest.kind == "pretrain":
        from prismoe.showmixture import describe_trained

        found = describe_trained(path, manifest)
    elif manifest is None and any((child / "train.ends").is_file() for child in path.iterdir()):
        from prismoe.showmixture import describe_mixture

        keys = ("weights", "steps", "seq_len", "batch_size", "max_epochs")
        found = describe_mixture(path, **{key: getattr(options, key) for key in keys})
    else:
        return None
    from prismoe.showmixture import draw_weights, show_mixture

    show_mixture(job.screen, found)
    if job.flags.out is not None:
        draw_weights(found, job.flags.out)
        job.screen.pairs({"picture": job.flags.out})
    return found
