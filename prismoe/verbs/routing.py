"""The verb `trace`: the stage of a run, or any mixture on any prepared domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prismoe.errors import UsageError
from prismoe.verbs import stages
from prismoe.verbs.job import Job

__all__ = ["trace"]


def trace(job: Job) -> dict[str, Any]:
    """A run's mixture on its own domains, or `prismoe trace MODEL DATA`."""
    if not job.others:
        folder = Path(job.subject or "")
        if job.subject is not None and (folder / "config.json").is_file() and not (folder / "run.yaml").is_file():
            raise UsageError("a model without text", where=job.subject, needed="a folder of prepared domains after it")
        return stages.stages(job)
    from prismoe import views
    from prismoe.config import load_config
    from prismoe.reference import find_domains
    from prismoe.routing.findings import describe_trace, write_traces
    from prismoe.routing.trace import trace as read

    seed = {} if job.flags.seed is None else {"seed": job.flags.seed}
    config = load_config(overrides=job.overrides, **seed)
    settings, out = config.trace, job.flags.out
    domains = find_domains(job.second("a folder of prepared domains"))
    models = [settings.model or str(job.subject), *([settings.before] if settings.before is not None else [])]
    with job.screen.progress() as on_progress:
        found = [
            read(
                model,
                domains,
                benchmarks=settings.benchmarks or (),
                seq_len=settings.seq_len or 512,
                max_tokens=settings.max_tokens,
                sample_tokens=settings.sample_tokens,
                batch_size=settings.batch_size,
                device=settings.device,
                seed=config.seed,
                offline=job.flags.offline,
                on_progress=on_progress,
            )
            for model in models
        ]
    earlier = found[1] if len(found) > 1 else None
    if out is not None:
        write_traces(Path(out), found[0], before=earlier, force=job.flags.force)
    receipt = describe_trace(found[0], before=earlier, out=out).to_dict()
    views.view(job.screen, "trace", receipt)
    return receipt
