"""The verbs about single experts of a mixture: `similarity` and `prune-experts`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prismoe.errors import UsageError
from prismoe.verbs.job import Job

__all__ = ["prune_experts", "similarity"]


def similarity(job: Job) -> dict[str, Any]:
    """Of a run folder with everything in it that can be compared, else of a mixture with the models named after it."""
    from prismoe.checkpoint import Checkpoint
    from prismoe.densify.densefamily import DENSE
    from prismoe.routing.likeness import FOLDER
    from prismoe.routing.similarity import similarity as compare
    from prismoe.showexperts import show_similarity

    if job.subject is None:
        raise UsageError("nothing to compare", where=job.verb, needed="a mixture or a run folder")
    out, offline = job.flags.out, job.flags.offline
    others: dict[str, str | Path | Checkpoint | None] = {"dense": None, "before": None}
    model: str | Path = job.subject
    if (run := _run_folder(job.subject)) is not None:
        model, others["dense"] = _model(run), job.config().source
        others["before"] = run / "moe" if model != run / "moe" and (run / "moe").is_dir() else None
        out = out or run / FOLDER
    for other in job.others:
        opened = Checkpoint.open(other, offline=offline)
        others["before" if opened.config.get("model_type") in DENSE else "dense"] = opened
    with job.screen.progress() as on_progress:
        found = compare(model, out=out, force=job.flags.force, offline=offline, on_progress=on_progress, **others)
    show_similarity(job.screen, found)
    return found.to_dict()


def prune_experts(job: Job) -> dict[str, Any]:
    """Of a model folder, or of the model of a run folder, with the run's trace and domains."""
    from prismoe.config.options import PruneOptions, read_options
    from prismoe.reference import find_domains
    from prismoe.routing.prune_experts import prune_experts as prune
    from prismoe.showexperts import show_pruned

    options = asdict(read_options(PruneOptions, job.overrides))
    source, out = job.source_and_out("a mixture or a run folder")
    run = _run_folder(source)
    model = source if run is None else _model(run)
    trace, domains = options.pop("trace"), options.pop("domains")
    places = [domains] if isinstance(domains, str) and domains else list(domains)
    if run is not None and not places and (run / "data").is_dir():
        places = [str(run)]
    with job.screen.progress() as on_progress:
        receipt = prune(
            model,
            trace=trace,
            out=out,
            domains=[domain for place in places for domain in find_domains(place)],
            offline=job.flags.offline,
            force=job.flags.force,
            dry_run=job.flags.dry_run,
            on_progress=on_progress,
            **options,
        ).to_dict()
    show_pruned(job.screen, receipt)
    for warning in receipt["warnings"]:
        job.screen.warning(warning)
    return receipt


def _run_folder(subject: str) -> Path | None:
    return Path(subject) if (Path(subject) / "run.yaml").is_file() else None


def _model(run: Path) -> Path:
    """The mixture of a run: trained where it was, else as it was converted."""
    places = (run / "train" / "model", run / "recovered", run / "moe")
    return next((path for path in places if path.is_dir()), run / "moe")
