"""The stage `trace`: which models of a run are traced, what the result depends on, and what is checked before."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError
from prismoe.folder import sha256_file
from prismoe.run.recovery import RECOVERED

if TYPE_CHECKING:
    from prismoe.checkpoint import Checkpoint
    from prismoe.config.settings import Config
    from prismoe.run.stages import Work

__all__ = ["check_trace", "trace_run", "traced"]


def traced(config: Config) -> dict[str, Any]:
    """What a trace depends on beside the models of the run and its text: the settings, and what their files hold."""
    from prismoe.checkpoint import Checkpoint
    from prismoe.routing.benchmarks import benchmark_files

    settings = config.trace
    found: dict[str, Any] = {"trace": asdict(settings), "seed": config.seed}
    named = {name: place for name in ("model", "before") if (place := getattr(settings, name)) is not None}
    found["models"] = {
        name: Checkpoint.open(place).fingerprint if (Path(place) / "config.json").is_file() else place
        for name, place in named.items()
    }
    try:
        files = benchmark_files(settings.benchmarks or ())
        found["benchmarks"] = {name: sha256_file(path) for name, path in files.items()}
    except InputError:  # a stage that needs none of them goes on; `check_trace` says it where they are needed
        found["benchmarks"] = {}
    return found


def check_trace(work: Work) -> None:
    """What can be wrong before a model is trained: benchmark files, and models that the config names.

    Raises:
        InputError: a file or folder is not there, or is not what it should be.
    """
    from prismoe.checkpoint import Checkpoint
    from prismoe.routing.benchmarks import benchmark_files, read_items
    from prismoe.routing.trace import check_mixture

    settings = work.config.trace
    for path in benchmark_files(settings.benchmarks or ()).values():
        next(read_items(path))
    for place in (settings.model, settings.before):
        if place is not None:
            check_mixture(Checkpoint.open(place, offline=work.offline))


def trace_run(work: Work) -> dict[str, Any]:
    """Trace the trained mixture, or the one of step 0 where nothing was trained; then also the one before it."""
    from prismoe.routing.findings import describe_trace, write_traces
    from prismoe.routing.trace import trace

    settings, training = work.config.trace, work.config.pretrain
    own: list[str | Path | Checkpoint] = [
        path
        for path in (work.folder("train/model"), work.folder(RECOVERED), work.folder("moe"))
        if (path / "config.json").is_file()
    ]
    if settings.model is None and not own:
        raise InputError("no mixture to trace", where=str(work.out), hint="`prismoe convert` first, or trace.model")
    model = own[0] if settings.model is None else settings.model
    before = settings.before or (own[1] if settings.model is None and len(own) > 1 else None)
    found = [
        trace(
            one,
            work.domains(),
            benchmarks=settings.benchmarks or (),
            seq_len=settings.seq_len or (training.seq_len if training else 512),
            max_tokens=settings.max_tokens,
            sample_tokens=settings.sample_tokens,
            batch_size=settings.batch_size,
            threads=training.threads if training else 0,
            device=settings.device,
            seed=work.config.seed,
            offline=work.offline,
            on_progress=work.on_progress,
        )
        for one in ([model] if before is None else [model, before])
    ]
    earlier = found[1] if len(found) > 1 else None
    out = work.folder("trace")
    write_traces(out, found[0], before=earlier, force=True)
    return describe_trace(found[0], before=earlier, out=str(out)).to_dict()
