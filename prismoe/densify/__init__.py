"""MoE folder → dense folder, where the experts partition a dense FFN: the way back of `convert`.

With the plan that the experts were cut by, zero neurons, the folded scale and the order of neurons are undone, and
a model that was not trained since is its parent again, bit for bit where the scale is a power of two. Without one the
experts are laid side by side: the FFN is then the sum of all experts as they are stored.
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig, check_tensors, optional_tensor, tensor_shapes
from prismoe.convert.job import PLAN
from prismoe.convert.layout import lay_out, recipe_tensor
from prismoe.convert.stream import Output, Written, check_room, job_key, write_folder
from prismoe.densify.densefamily import DENSE, dense_counterpart
from prismoe.densify.expertblocks import ExpertBlock, Parts, expert_block, look_alike
from prismoe.errors import InputError, UsageError
from prismoe.folder import FileEntry
from prismoe.layerplan import LayerPlan
from prismoe.plan import Plan, plan_shape
from prismoe.progress import Progress, quiet
from prismoe.recipe import Copy, IntArray, Recipe, Weave
from prismoe.target import Target
from prismoe.targets import find_target

__all__ = ["Densified", "densify"]

OPEN_SINK = -1e3
"""A logit so far below all others takes no attention at all."""
HALF = 1e-6
"""Entries of a shared_expert_gate row below which its sigmoid is one half on any input."""


@dataclass(frozen=True)
class Densified:
    """Receipt of `densify`. Sizes in bytes, `seconds` of wall time, `state` as in `Conversion`.

    `neuron_order` is "plan" (the parent's) or "stored" (expert after expert). `scales` are the factors that were taken
    out of the experts; `bit_exact` says that no number was rounded by that. `parent` is the fingerprint of the dense
    checkpoint that the plan was made for, empty without a plan. `zero_neurons` were padding.
    """

    out: str
    model_type: str
    made_from: str
    state: str
    num_experts: int
    intermediate_size: int
    neuron_order: str
    scales: tuple[float, ...]
    bit_exact: bool
    zero_neurons: int
    parent: str
    num_tensors: int
    num_shards: int
    kept_shards: int
    dropped: tuple[str, ...]
    total_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    warnings: tuple[str, ...]
    files: dict[str, FileEntry]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Joined:
    """One layer: what is laid side by side (routed experts, then the shared one), and in which order."""

    block: ExpertBlock
    counts: tuple[int, ...]  # neurons of each expert, the shared one last
    order: IntArray
    factors: dict[str, float]  # what the stored routed experts are multiplied by

    @property
    def num_neurons(self) -> int:
        return len(self.order)


def densify(
    source: str | Path | Checkpoint,
    *,
    out: str | Path,
    plan: str | Path | Plan | None = None,
    scale: float | None = None,
    max_shard_bytes: int = 5_000_000_000,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Densified:
    """Write the dense model whose FFN are the experts of `source` together, loadable with stock transformers.

    Args:
        source: a mixture in one of the architectures of `DENSE`, its folder or hub name.
        plan: what the experts were cut by; default: moe.plan in the folder, where there is one.
        scale: factor that is folded into the experts and is taken out, where no plan says it.
        max_shard_bytes, force, dry_run: as in `convert`.

    Raises:
        UsageError: experts that overlap, are copies or were changed; a scale beside a plan.
        InputError: no such mixture, damaged, or the plan is another model's.
        ResourceError: not enough disk or memory, or the output folder is in use or not ours.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    started, out = time.monotonic(), Path(out)
    checkpoint = Checkpoint.open(source, offline=offline)
    where = str(checkpoint.folder)
    model_type = checkpoint.config.get("model_type")
    if model_type not in DENSE:
        found = f"model_type {model_type!r}"
        raise InputError(found, where=where, needed=f"a mixture: {', '.join(sorted(DENSE))}")
    if not checkpoint.has_weights:
        raise InputError("config.json without weights", where=where, needed="model.safetensors")
    known = _plan(plan, checkpoint)
    if scale is not None and (known is not None or not math.isfinite(scale) or scale <= 0):
        found = f"{scale} beside a plan, which says it" if known is not None else f"{scale}"
        raise UsageError(found, where="scale", needed="a number above 0, where there is no plan")
    target = find_target(str(model_type))
    joined = _join(checkpoint, target, known, scale=1.0 if scale is None else scale)
    own = checkpoint.folder / PLAN
    if known is not None and plan is not None and own.is_file() and own.read_bytes() != known.to_bytes():
        raise InputError("another plan than the one it was cut by", where=where, needed=PLAN, hint="leave plan= out")
    neurons = max(layer.num_neurons for layer in joined.values())
    dense, config = dense_counterpart(checkpoint, neurons=neurons, moe_layers=frozenset(joined))
    recipes = _recipes(checkpoint, dense, joined)
    shapes = {key: recipe_tensor(recipe, checkpoint.tensors, key=key)[1] for key, recipe in recipes.items()}
    check_tensors(dense, shapes, where=where)
    settings = {"made_from": model_type, "scale": scale, "max_shard_bytes": max_shard_bytes}
    side_files = {path.name: path.read_bytes() for path in checkpoint.side_files}
    plan_bytes = b"" if known is None else known.to_bytes()
    parents = {"source": checkpoint.fingerprint}
    output = Output(
        kind="densify",
        checkpoint=checkpoint,
        settings=settings,
        config=config,
        shards=lay_out(recipes, checkpoint.tensors, max_shard_bytes=max_shard_bytes),
        files=side_files,
        parents=parents | ({} if known is None else {"plan": hashlib.sha256(plan_bytes).hexdigest()}),
        key=job_key(checkpoint, ["densify", settings, config], plan_bytes, side_files=side_files),
    )
    _check_left_over(output, dense, target, moe_layers=frozenset(joined))
    free = check_room(output, out)
    written = Written("dry run", {}, 0)
    if not dry_run:
        written = write_folder(output, out, force=force, on_progress=on_progress)
    return _receipt(output, out, written, dense, joined, known, scale=scale, free=free, started=started)


def _plan(given: str | Path | Plan | None, checkpoint: Checkpoint) -> Plan | None:
    if isinstance(given, Plan):
        return given
    path = checkpoint.folder / PLAN if given is None else Path(given)
    return Plan.load(path) if given is not None or path.is_file() else None


def _join(checkpoint: Checkpoint, target: Target, plan: Plan | None, *, scale: float) -> dict[int, _Joined]:
    """Every layer with experts; refuses what is no partition."""
    where = str(checkpoint.folder)
    num_layers = checkpoint.config.get("num_hidden_layers")
    if type(num_layers) is not int or not 0 < num_layers < 100_000:
        raise InputError(f"{num_layers!r}", where=f"{where}: num_hidden_layers", needed="a positive whole number")
    blocks = {layer: expert_block(checkpoint, target, layer) for layer in range(num_layers)}
    mixed = {layer: block for layer, block in blocks.items() if block is not None}
    if not mixed:
        raise InputError("no layer has experts", where=where, needed="tensors of a mixture")
    if plan is None:
        for layer in sorted({min(mixed), sorted(mixed)[len(mixed) // 2], max(mixed)}):
            if pair := look_alike(checkpoint, mixed[layer]):
                raise UsageError(
                    f"experts {pair[0]} and {pair[1]} of layer {layer} share neurons or are copies of one FFN",
                    where=where,
                    needed="experts that partition one dense FFN",
                )
        return {layer: _stored(checkpoint, block, scale) for layer, block in mixed.items()}
    planned = tuple(layer for layer, found in enumerate(plan.layers) if found is not None)
    if len(plan.layers) != num_layers or planned != tuple(mixed):
        raise InputError(
            f"a plan of {len(plan.layers)} layers with experts in {_some(planned)}",
            where=where,
            needed=f"{num_layers} layers with experts in {_some(tuple(mixed))}",
            hint="the plan is another model's",
        )
    return {layer: _planned(plan, layer, block, where) for layer, block in mixed.items()}


def _stored(checkpoint: Checkpoint, block: ExpertBlock, scale: float) -> _Joined:
    """Experts as they lie in the file, without the zero neurons at their ends."""
    counts = tuple(block.width(e) - block.zero_tail(checkpoint, e) for e in range(block.num_blocks))
    order = np.arange(sum(counts), dtype=np.int32)
    return _Joined(block, counts, order, {"gate": 1.0, "up": 1.0, "down": 1.0 / scale})


def _planned(plan: Plan, layer: int, block: ExpertBlock, where: str) -> _Joined:
    """Experts in the order of the dense neurons."""
    found = plan.layers[layer]
    assert isinstance(found, LayerPlan)
    if found.redraw is not None or found.noise is not None:
        raise UsageError("experts were changed by noise or drawn anew", where=f"{where}: layer {layer} of the plan")
    held = np.concatenate([found.experts.ravel(), found.shared])
    ids, times = np.unique(held, return_counts=True)
    if times.max() > 1:
        neuron = int(ids[times.argmax()])
        raise UsageError(
            f"neuron {neuron} is in {times.max()} experts",
            where=f"{where}: layer {layer} of the plan",
            needed="experts that partition one dense FFN",
        )
    if len(found.shared) and block.num_blocks == block.num_experts:
        raise UsageError(
            f"{len(found.shared)} shared neurons are in every expert",
            where=f"{where}: layer {layer} of the plan",
            needed="experts that partition one dense FFN",
            hint="convert without absorb",
        )
    counts = [found.experts.shape[1]] * len(found.experts) + ([len(found.shared)] if len(found.shared) else [])
    stored = [block.width(e) for e in range(block.num_blocks)]
    # A layer without shared neurons still has the block of zeros where another layer has some.
    counts += [0] * (len(stored) - len(counts))
    if len(counts) != len(stored) or any(count > width for count, width in zip(counts, stored, strict=True)):
        raise InputError(
            f"experts of {sorted(set(counts))} neurons ({len(counts)} with the shared one)",
            where=f"{where}: layer {layer} of the plan",
            needed=f"at most {sorted(set(stored))} ({len(stored)})",
            hint="the plan is another model's",
        )
    factors = {part: 1.0 / factor for part, factor in found.factors.items()}
    return _Joined(block, tuple(counts), np.argsort(held).astype(np.int32), factors)


def _recipes(checkpoint: Checkpoint, dense: DenseConfig, joined: dict[int, _Joined]) -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for name in tensor_shapes(dense):
        words = name.split(".")
        layer = joined.get(int(words[2])) if ".mlp." in name else None
        recipes[name] = Copy(name) if layer is None else _woven(dense, layer, words[4].removesuffix("_proj"))
    if dense.tie_embeddings and "lm_head.weight" in checkpoint.tensors:
        recipes["lm_head.weight"] = Copy("lm_head.weight")
    return recipes


def _woven(dense: DenseConfig, layer: _Joined, part: str) -> Weave:
    axis = int(part == "down")
    shape = (dense.hidden_size, dense.intermediate_size) if axis else (dense.intermediate_size, dense.hidden_size)
    strands = tuple(
        layer.block.strand(part, e, count=count, factor=layer.factors[part])
        for e, count in enumerate(layer.counts)
        if count
    )
    return Weave(shape, axis, strands, layer.order)


def _check_left_over(output: Output, dense: DenseConfig, target: Target, *, moe_layers: frozenset[int]) -> None:
    """Tensors that went nowhere are the routers and what the architecture adds; anything else changes the model."""
    extra = [target.router, *(constant.key for constant in target.constants)]
    known = {key.format(l=layer) for key in extra for layer in moe_layers}
    read = output.checkpoint.array
    # A target that wants biases or a shared expert has zeros where the source had none; open sinks take nothing.
    shared = {slot.key.format(l=layer) for slot in target.shared for layer in moe_layers}
    biases = {name for name in output.dropped if ".self_attn." in name and name.endswith("_proj.bias")}
    known |= {name for name in output.dropped if name in shared | biases and not read(name).any()}
    known -= {name for name in output.dropped if name.endswith(".sinks") and (read(name) > OPEN_SINK).any()}
    unknown = [name for name in output.dropped if name not in known and not optional_tensor(dense, name)]
    if unknown:
        found = f"unexpected tensor {unknown[0]}" + (f" and {len(unknown) - 1} more" if len(unknown) > 1 else "")
        raise InputError(found, where=str(output.checkpoint.folder), needed="what config.json describes")


def _receipt(
    output: Output,
    out: Path,
    written: Written,
    dense: DenseConfig,
    joined: dict[int, _Joined],
    plan: Plan | None,
    *,
    scale: float | None,
    free: int,
    started: float,
) -> Densified:
    scales = (1.0 if scale is None else scale,) if plan is None else plan_shape(plan).scales
    factors = {layer.factors[part] for layer in joined.values() for part in Parts}
    warnings = []
    if plan is None and scale is None:
        warnings.append("no plan: the experts are summed as they are stored; scale=S takes a folded scale out")
    if plan is not None and dense.intermediate_size < plan.num_neurons:
        warnings.append(f"the plan holds {dense.intermediate_size} of the parent's {plan.num_neurons} neurons")
    gates = (n for n in output.dropped if n.endswith(".shared_expert_gate.weight"))
    if any(bool((abs(output.checkpoint.array(name)) > HALF).any()) for name in gates):
        warnings.append("the shared expert's gate was trained: its sigmoid is taken for the one half it started from")
    stored = sum(layer.block.width(e) for layer in joined.values() for e in range(layer.block.num_blocks))
    return Densified(
        out=str(out),
        model_type=dense.family,
        made_from=output.settings["made_from"],
        state=written.state,
        num_experts=next(iter(joined.values())).block.num_experts,
        intermediate_size=dense.intermediate_size,
        neuron_order="stored" if plan is None else "plan",
        scales=scales,
        # Dividing by a power of two changes no digit; below 1 float16 may have lost some when it was folded in.
        bit_exact=all(math.frexp(factor)[0] == 0.5 and factor <= 1 for factor in factors),
        zero_neurons=stored - sum(layer.num_neurons for layer in joined.values()),
        parent="" if plan is None else plan.origin.source,
        num_tensors=sum(len(shard.keys) for shard in output.shards),
        num_shards=len(output.shards),
        kept_shards=written.kept_shards,
        dropped=output.dropped,
        total_bytes=output.total_bytes,
        free_bytes=free,
        memory_bytes=output.memory_bytes,
        seconds=round(time.monotonic() - started, 3),
        warnings=tuple(warnings),
        files=written.files,
    )


def _some(layers: tuple[int, ...]) -> str:
    return f"{len(layers)} layers from {layers[0]} to {layers[-1]}" if layers else "none"
