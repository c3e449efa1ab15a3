"""One conversion, decided and checked before the first byte is written: shards, key, disk and memory."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, UsageError
from prismoe.layout import Shard, lay_out
from prismoe.plan import Plan, plan_shape
from prismoe.recipe import Fill
from prismoe.room import require_room
from prismoe.target import lower, output_config
from prismoe.targets import find_target
from prismoe.writer import BUFFER_BYTES

__all__ = ["PLAN", "Job", "check_room", "is_shard", "prepare"]

PLAN = "plan.safetensors"
MOST_WORKERS = 4  # shards at a time; more only adds memory, the disk is busy by then
BASE_BYTES = 96 << 20  # interpreter, NumPy, indices


@dataclass(frozen=True, eq=False)
class Job:
    """All that is known before the first byte is written."""

    checkpoint: Checkpoint
    plan: Plan
    settings: dict[str, Any]
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    dropped: tuple[str, ...]
    plan_bytes: bytes
    side_files: dict[str, bytes]
    key: str

    @property
    def workers(self) -> int:
        return min(MOST_WORKERS, len(self.shards), os.cpu_count() or 1)

    @property
    def total_bytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    @property
    def memory_bytes(self) -> int:
        return BASE_BYTES + self.workers * BUFFER_BYTES


def prepare(checkpoint: Checkpoint, plan: Plan, target: str, pad_to: int, max_shard_bytes: int) -> Job:
    if not checkpoint.has_weights:
        raise InputError("config.json without weights", where=str(checkpoint.folder), needed="model.safetensors")
    if pad_to < 1:
        raise UsageError(f"{pad_to}", where="convert.pad_to", needed="1 or more")
    table = find_target(target)
    recipes = lower(checkpoint, plan, table, pad_to=pad_to)
    config = output_config(checkpoint, plan_shape(plan), table, pad_to=pad_to)
    shards = lay_out(recipes, checkpoint.tensors, max_shard_bytes=max_shard_bytes)
    used = {piece.recipe.source for shard in shards for piece in shard.pieces if not isinstance(piece.recipe, Fill)}
    settings = {"target": target, "pad_to": pad_to, "max_shard_bytes": max_shard_bytes}
    side_files = {path.name: path.read_bytes() for path in checkpoint.side_files}
    plan_bytes = plan.to_bytes()
    digest = hashlib.sha256(json.dumps([checkpoint.fingerprint, settings, config], sort_keys=True).encode())
    for part in (plan_bytes, *(text for pair in side_files.items() for text in (pair[0].encode(), pair[1]))):
        digest.update(hashlib.sha256(part).digest())
    return Job(
        checkpoint=checkpoint,
        plan=plan,
        settings=settings,
        config=config,
        shards=shards,
        dropped=tuple(sorted(set(checkpoint.tensors) - used)),
        plan_bytes=plan_bytes,
        side_files=side_files,
        key=digest.hexdigest(),
    )


def check_room(job: Job, out: Path) -> int:
    """Compare disk and memory with what the job needs; returns the free bytes of the disk.

    Shards that an earlier, stopped run finished are there already.
    """
    there = sum(shard.nbytes for shard in job.shards if is_shard(out / shard.name, shard))
    needed = job.total_bytes - there + sum(map(len, job.side_files.values())) + len(job.plan_bytes) + (1 << 20)
    return require_room(out, disk_bytes=needed, memory_bytes=job.memory_bytes)


def is_shard(path: Path, shard: Shard) -> bool:
    """Whether `path` is this shard, finished: only whole files ever get the final name."""
    if not path.is_file() or path.stat().st_size != shard.nbytes:
        return False
    with path.open("rb") as file:
        return file.read(len(shard.header)) == shard.header
