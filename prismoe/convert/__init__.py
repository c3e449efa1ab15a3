"""Dense folder + plan + target → MoE folder, streamed: memory and speed do not depend on the size of the model.

Everything is decided and checked on shapes first; `prismoe/convert/stream.py` then writes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import Job, prepare
from prismoe.convert.stream import Written, check_room, write_folder
from prismoe.folder import FileEntry
from prismoe.plan import Plan, plan_shape
from prismoe.portability import Portability, portability
from prismoe.progress import Progress, quiet
from prismoe.target import absorbed

__all__ = ["Conversion", "convert"]


@dataclass(frozen=True)
class Conversion:
    """Receipt of `convert`. Sizes in bytes, `seconds` of wall time.

    `state` is "written", "already complete" or "dry run"; `kept_shards` were finished by an earlier, stopped run.
    `portability` says which engines run it right. `dropped` are source tensors that the converted model does not need.
    `free_bytes` is what the disk had before. `branches` are the checkpoints beside the source that experts are made of:
    folder (`name`) and `fingerprint`, in the order of the plan.
    """

    out: str
    target: str
    absorb: bool
    state: str
    num_experts: int
    top_k: int
    branches: tuple[dict[str, str], ...]
    num_tensors: int
    num_shards: int
    kept_shards: int
    dropped: tuple[str, ...]
    total_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    portability: tuple[Portability, ...]
    files: dict[str, FileEntry]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def convert(
    source: str | Path | Checkpoint,
    plan: Plan,
    *,
    target: str = "mixtral",
    out: str | Path,
    pad_to: int = 32,
    max_shard_bytes: int = 5_000_000_000,
    absorb: bool = False,
    branches: Sequence[str | Path] | None = None,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Conversion:
    """Write the MoE model of `plan` on `source` into the folder `out`, loadable with stock transformers.

    Every tensor keeps the dtype of its source and, unless a factor is folded in, every bit. The same call after a
    stop, even by kill -9, continues and gives the same bytes. `dry_run` stops after all checks and writes nothing.

    Args:
        source: a dense checkpoint, its folder or hub name.
        plan: see `make_plan`.
        target: a file of `prismoe/targets`.
        pad_to: expert widths are rounded up to a multiple of this with zero neurons (lossless).
        max_shard_bytes: data bytes of one output file; a single larger tensor gets its own.
        absorb: append the shared neurons to every expert, for targets without a shared expert: the same function,
            the shared neurons computed top_k times and stored num_experts times.
        branches: of a plan made of several checkpoints, their folders; None: where they were when it was made.
        force: start over in an output folder of ours that holds another job.

    Raises:
        UsageError: the target cannot hold this plan on this model exactly.
        InputError: the checkpoint is damaged, holds NaN or infinity, or is not the plan's, or a branch is not.
        ResourceError: not enough disk or memory, or the output folder is in use or not ours.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    started, out = time.monotonic(), Path(out)
    sources = plan.sources(Checkpoint.open(source, offline=offline), branches=branches, offline=offline)
    job = prepare(sources, plan, target, pad_to, max_shard_bytes, absorb=absorb)
    free = check_room(job, out)
    if dry_run:
        return _receipt(job, out, Written("dry run", {}, 0), free=free, started=started)
    return _receipt(job, out, write_folder(job, out, force=force, on_progress=on_progress), free=free, started=started)


def _receipt(job: Job, out: Path, written: Written, *, free: int, started: float) -> Conversion:
    return Conversion(
        out=str(out),
        target=job.settings["target"],
        absorb=job.settings["absorb"],
        state=written.state,
        num_experts=plan_shape(job.plan).num_experts,
        top_k=job.plan.top_k,
        branches=tuple({"name": str(b.folder), "fingerprint": b.fingerprint} for b in job.checkpoint.donors[1:]),
        num_tensors=sum(len(shard.keys) for shard in job.shards),
        num_shards=len(job.shards),
        kept_shards=written.kept_shards,
        dropped=job.dropped,
        total_bytes=job.total_bytes,
        free_bytes=free,
        memory_bytes=job.memory_bytes,
        seconds=round(time.monotonic() - started, 3),
        portability=portability(
            job.checkpoint.family,
            absorbed(plan_shape(job.plan)) if job.settings["absorb"] else plan_shape(job.plan),
            job.settings["target"],
        ),
        files=written.files,
    )
