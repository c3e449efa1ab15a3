"""`show`: describe what a path names."""

from __future__ import annotations

from collections.abc import Mapping
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
    if (mixed := _beside(job, found, options)) is not None:
        _show(job, mixed)
        found["mixture"] = mixed
    return found


def _mixture(job: Job, options: ShowOptions) -> dict[str, Any] | None:
    """A folder of prepared domains or of a training run; None for anything else."""
    from prismoe.folder import Manifest
    from prismoe.showmixture import SETTINGS, describe_mixture, describe_trained

    path = Path(job.subject or "")
    if not path.is_dir():
        return None
    manifest = Manifest.read(path)
    if (manifest is None and (path / SETTINGS).is_file()) or (manifest is not None and manifest.kind == "pretrain"):
        found = describe_trained(path)
    elif manifest is None and any((child / "train.ends").is_file() for child in path.iterdir()):
        found = describe_mixture(path, weights=options.weights, **_sizes(options))
    else:
        return None
    _show(job, found)
    return found


def _beside(job: Job, found: Mapping[str, Any], options: ShowOptions) -> dict[str, Any] | None:
    """The mixture that a config speaks of, or that a run trains on that is not finished."""
    from prismoe.folder import MANIFEST
    from prismoe.showmixture import SETTINGS, describe_planned, describe_trained

    path = Path(job.subject or "")
    if found["kind"] == "config" and ("data" in found["config"] or job.flags.out is not None):
        from prismoe.config import load_config

        return describe_planned(load_config(path), otherwise=_sizes(options))
    training = path / "train"
    if found["kind"] == "run" and (training / SETTINGS).is_file() and not (training / MANIFEST).is_file():
        return describe_trained(training)
    return None


def _sizes(options: ShowOptions) -> dict[str, Any]:
    return {key: getattr(options, key) for key in ("steps", "seq_len", "batch_size", "max_epochs")}


def _show(job: Job, found: Mapping[str, Any]) -> None:
    from prismoe.showmixture import draw_weights, show_mixture

    show_mixture(job.screen, found)
    if job.flags.out is not None:
        draw_weights(found, job.flags.out)
        job.screen.pairs({"picture": job.flags.out})
