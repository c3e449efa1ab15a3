"""One conversion, decided and checked before the first byte is written."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from prismoe.checkpoint import Checkpoint
from prismoe.convert.layout import lay_out
from prismoe.convert.stream import Output, job_key
from prismoe.errors import InputError, UsageError
from prismoe.lowering import lower
from prismoe.plan import Plan, plan_shape
from prismoe.target import absorbed, output_config
from prismoe.targets import find_target

__all__ = ["PLAN", "Job", "prepare"]

PLAN = "moe.plan"
"""A safetensors file under another name: readers that load every *.safetensors of a folder must not meet it."""


@dataclass(frozen=True, eq=False)
class Job(Output):
    """A folder that holds the plan it was made by."""

    plan: Plan


def prepare(
    checkpoint: Checkpoint, plan: Plan, target: str, pad_to: int, max_shard_bytes: int, *, absorb: bool = False
) -> Job:
    for donor in checkpoint.donors:
        if not donor.has_weights:
            raise InputError("config.json without weights", where=str(donor.folder), needed="model.safetensors")
    if pad_to < 1:
        raise UsageError(f"{pad_to}", where="convert.pad_to", needed="1 or more")
    table = find_target(target)
    made_for = plan.origin.source  # empty in a plan that was made by hand
    if made_for and not checkpoint.is_source_of(made_for):
        raise InputError(
            f"a plan made for another checkpoint ({made_for[:12]}…)",
            where=str(checkpoint.folder),
            needed=f"one made for {checkpoint.fingerprint[:12]}…",
            hint="run prismoe plan on it",
        )
    recipes = lower(checkpoint, plan, table, pad_to=pad_to, absorb=absorb)
    shape = absorbed(plan_shape(plan)) if absorb else plan_shape(plan)
    config = output_config(checkpoint, shape, table, pad_to=pad_to)
    shards = lay_out(recipes, checkpoint.tensors, max_shard_bytes=max_shard_bytes)
    settings = {"target": target, "pad_to": pad_to, "max_shard_bytes": max_shard_bytes, "absorb": absorb}
    side_files = {path.name: path.read_bytes() for path in checkpoint.side_files}
    plan_bytes = plan.to_bytes()
    branches = {f"branch {number}": found for number, found in enumerate(plan.branches, start=1)}
    return Job(
        kind="convert",
        checkpoint=checkpoint,
        settings=settings,
        config=config,
        shards=shards,
        files={**side_files, PLAN: plan_bytes},
        parents={"source": checkpoint.fingerprint, **branches, "plan": hashlib.sha256(plan_bytes).hexdigest()},
        key=job_key(checkpoint, [settings, config], plan_bytes, side_files=side_files),
        plan=plan,
    )
