"""`similarity`: how alike the experts of a mixture are, how far from the dense FFN and from an earlier checkpoint.

Read straight from the files, a layer at a time and some neurons of it at a time; no model is built.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import PLAN
from prismoe.convert.stream import finished
from prismoe.densify.densefamily import DENSE
from prismoe.densify.expertblocks import ExpertBlock, expert_block
from prismoe.errors import InputError
from prismoe.folder import Manifest, claim, hash_files, sha256_file, versions, write_atomic
from prismoe.plan import Plan
from prismoe.progress import Progress, quiet
from prismoe.routing.likeness import FILE, Duplicate, Similarity
from prismoe.routing.neurons import Experts, sample_size
from prismoe.targets import find_target

__all__ = ["Duplicate", "Similarity", "expert_blocks", "similarity"]

KIND = "similarity"


def similarity(
    model: str | Path | Checkpoint,
    *,
    dense: str | Path | Checkpoint | None = None,
    before: str | Path | Checkpoint | None = None,
    out: str | Path | None = None,
    force: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Similarity:
    """Compare the routed experts of `model` with each other, with `dense` and with the checkpoint `before`.

    With a plan in the folder (moe.plan) a folded scale is taken out first, and an expert is compared with its own
    dense neurons; without one experts have to be copies of the whole FFN.

    Args:
        model: a mixture in one of the architectures that `convert` writes, its folder or hub name.
        dense: the dense checkpoint that it was made from.
        before: an earlier checkpoint of the same run, for instance the mixture as it was converted.
        out: folder for `similarity.safetensors` and a manifest.

    Raises:
        InputError: no mixture, damaged, or `dense` or `before` is another model's.
        ResourceError: `out` is in use or not ours.
    """
    now = Checkpoint.open(model, offline=offline)
    parent = None if dense is None else Checkpoint.open(dense, offline=offline)
    earlier = None if before is None else Checkpoint.open(before, offline=offline)
    blocks = expert_blocks(now)
    plan = Plan.load(now.folder / PLAN) if (now.folder / PLAN).is_file() else None
    if plan is not None:
        _check_plan(plan, blocks, now, parent)
    opened = {"model": now, "dense": parent, "before": earlier}
    provenance = {
        **{name: None if found is None else _described(found) for name, found in opened.items()},
        "plan": None if plan is None else sha256_file(now.folder / PLAN),
        "versions": versions(),
    }
    parents = {name: found.fingerprint for name, found in opened.items() if found is not None}
    if out is None:
        return _measure(now, blocks, plan, parent, earlier, provenance, on_progress)
    key = hashlib.sha256(json.dumps([parents, provenance["plan"]], sort_keys=True).encode()).hexdigest()
    with claim(Path(out), kind=KIND, key=key, force=force):
        if finished(Path(out), kind=KIND, key=key):
            return Similarity.open(out)
        found = _measure(now, blocks, plan, parent, earlier, provenance, on_progress)
        write_atomic(Path(out) / FILE, found.to_bytes())
        Manifest(kind=KIND, key=key, parents=parents, config={}, files=hash_files(Path(out), [FILE])).write(Path(out))
    return found


def expert_blocks(checkpoint: Checkpoint) -> dict[int, ExpertBlock]:
    """Every layer with experts, by number.

    Raises:
        InputError: not a mixture of ours, without weights, or damaged.
    """
    where, model_type = str(checkpoint.folder), checkpoint.config.get("model_type")
    if model_type not in DENSE:
        needed = f"a mixture: {', '.join(sorted(DENSE))}"
        raise InputError(f"model_type {model_type!r} has no router that we know", where=where, needed=needed)
    if not checkpoint.has_weights:
        raise InputError("config.json without weights", where=where, needed="model.safetensors")
    num_layers = checkpoint.config.get("num_hidden_layers")
    if type(num_layers) is not int or not 0 < num_layers < 100_000:
        raise InputError(f"{num_layers!r}", where=f"{where}: num_hidden_layers", needed="a positive whole number")
    target = find_target(str(model_type))
    found = {layer: expert_block(checkpoint, target, layer) for layer in range(num_layers)}
    blocks = {layer: block for layer, block in found.items() if block is not None}
    if not blocks:
        raise InputError("no layer has a router", where=where, needed="tensors of a mixture")
    if len({block.num_experts for block in blocks.values()}) > 1:
        raise InputError("layers differ in their number of experts", where=where, needed="one number")
    return blocks


def _check_plan(plan: Plan, blocks: dict[int, ExpertBlock], now: Checkpoint, parent: Checkpoint | None) -> None:
    planned = [layer for layer, found in enumerate(plan.layers) if found is not None]
    if planned != list(blocks):
        raise InputError(
            f"a plan with experts in {len(planned)} layers",
            where=str(now.folder / PLAN),
            needed=f"the {len(blocks)} layers of the model",
            hint="the plan is another model's",
        )
    if parent is not None and plan.origin.source and not parent.is_source_of(plan.origin.source):
        raise InputError(
            "is not the checkpoint that the mixture was cut from",
            where=str(parent.folder),
            needed=f"fingerprint {plan.origin.source[:12]}…, found {parent.fingerprint[:12]}…",
        )


def _measure(
    now: Checkpoint,
    blocks: dict[int, ExpertBlock],
    plan: Plan | None,
    parent: Checkpoint | None,
    earlier: Checkpoint | None,
    provenance: dict[str, Any],
    on_progress: Progress,
) -> Similarity:
    old = None if earlier is None else expert_blocks(earlier)
    if earlier is not None and old is not None and not _same_kind(now, blocks, earlier, old):
        other, kind = next(iter(old.values())), earlier.config["model_type"]
        raise InputError(
            f"a {kind} of {other.num_experts} experts {other.width(0)} wide in {len(old)} layers",
            where=str(earlier.folder),
            needed=f"an earlier checkpoint of {now.folder}",
        )
    if parent is not None and parent.family.num_layers != now.config["num_hidden_layers"]:
        found = f"{parent.family.num_layers} layers"
        raise InputError(found, where=str(parent.folder), needed=str(now.config["num_hidden_layers"]))
    first = next(iter(blocks.values()))
    most = sample_size(first.num_experts, first.hidden_size)
    rows: dict[str, list[Any]] = {name: [] for name in ("cosine", "matched", "dense", "drift", "router")}
    router = find_target(str(now.config["model_type"])).router
    for done, (layer, block) in enumerate(blocks.items()):
        on_progress("comparing experts", done, len(blocks))
        layer_plan = None if plan is None else plan.layers[layer]
        experts = Experts.of(now, block, layer_plan)
        rows["cosine"].append(experts.cosines())
        rows["matched"].append(experts.matched(most))
        if parent is not None:
            rows["dense"].append(experts.against(parent.ffn(layer)))
        if earlier is not None and old is not None:
            rows["drift"].append(experts.moved(Experts.of(earlier, old[layer], layer_plan)))
            rows["router"].append(_router_moved(now, earlier, router.format(l=layer)))
    on_progress("comparing experts", len(blocks), len(blocks))
    made = {name: np.array(found, np.float64) if found else None for name, found in rows.items()}
    cosine, matched = made["cosine"], made["matched"]
    assert cosine is not None
    assert matched is not None
    return Similarity(
        layers=tuple(blocks),
        num_experts=first.num_experts,
        sampled=min(most, first.width(0)),
        cosine_LEE=cosine,
        matched_LEE=matched,
        dense_LE=made["dense"],
        drift_LE=made["drift"],
        router_drift_L=made["router"],
        provenance=provenance,
    )


def _same_kind(
    now: Checkpoint, blocks: dict[int, ExpertBlock], earlier: Checkpoint, old: dict[int, ExpertBlock]
) -> bool:
    kinds = [
        (
            folder.config["model_type"],
            [(layer, block.num_experts, block.width(0), block.hidden_size) for layer, block in found.items()],
        )
        for folder, found in ((now, blocks), (earlier, old))
    ]
    return kinds[0] == kinds[1]


def _router_moved(now: Checkpoint, earlier: Checkpoint, key: str) -> float:
    new, old = now.array(key).astype(np.float64), earlier.array(key).astype(np.float64)
    size = float(np.linalg.norm(old))
    return float(np.linalg.norm(new - old)) / size if size else float("nan")


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "folder": str(checkpoint.folder),
        "model_type": checkpoint.config.get("model_type"),
        "fingerprint": checkpoint.fingerprint,
    }
