"""`prune_experts`: a mixture without the experts that few tokens went to, in its own stock architecture.

Tensors are moved, never computed: the experts that stay keep every bit, the router its rows for them. That is the whole
model with the logits of the others at -inf, and a check on real text says so (`prismoe.routing.masked`).
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.convert.job import PLAN
from prismoe.convert.layout import lay_out, recipe_tensor
from prismoe.convert.stream import Output, Written, check_room, job_key, write_folder
from prismoe.data.shards import Domain
from prismoe.errors import InputError
from prismoe.evaluate import evaluate
from prismoe.folder import FileEntry, write_json_atomic
from prismoe.plan import Plan
from prismoe.progress import Progress, quiet
from prismoe.routing.choice import RECEIPT, Choice, Criterion, choose_experts
from prismoe.routing.masked import compare_masked
from prismoe.routing.record import FILE, RoutingTrace
from prismoe.routing.removal import carries_over, remaining_config, remaining_plan, remaining_recipes
from prismoe.routing.similarity import expert_blocks
from prismoe.targets import find_target
from prismoe.train.fit import check_fit

__all__ = ["PrunedExperts", "PrunedLayer", "prune_experts"]

UNEVEN = 1.0
"""A removed expert with more than its fair share of a domain is worth a word."""


@dataclass(frozen=True)
class PrunedLayer:
    """Experts of a layer by their numbers before; `removed_share` of the routing went to those that are gone."""

    layer: int
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    removed_share: float


@dataclass(frozen=True)
class PrunedExperts:
    """Receipt of `prune_experts`. Sizes in bytes, `seconds` of wall time, `state` as in `Conversion`.

    `removed_share` is of the routing by `criterion`, mean over the layers and the domains that decided;
    `removed_share_of` the same of each domain. `perplexity` before and after by domain, empty where none was given;
    `proof` is None in a dry run.
    """

    out: str
    model_type: str
    state: str
    criterion: str
    threshold: float | None
    num_experts_before: int
    num_experts: int
    top_k: int
    layers: tuple[PrunedLayer, ...]
    removed_share: float
    removed_share_of: dict[str, float]
    parameters_before: int
    parameters: int
    perplexity: dict[str, dict[str, float]]
    proof: dict[str, Any] | None
    trace: dict[str, Any]
    num_tensors: int
    num_shards: int
    total_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    warnings: tuple[str, ...]
    files: dict[str, FileEntry]

    @property
    def parameters_saved(self) -> int:
        return self.parameters_before - self.parameters

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "parameters_saved": self.parameters_saved}


def prune_experts(
    model: str | Path | Checkpoint,
    *,
    out: str | Path,
    trace: str | Path | RoutingTrace | None = None,
    keep: int | Sequence[int] | None = None,
    threshold: float | None = None,
    criterion: Criterion = "load",
    domains: Iterable[Domain | str | Path] = (),
    seq_len: int = 512,
    max_tokens: int | None = 65_536,
    batch_size: int = 16,
    threads: int = 0,
    tokens: int = 128,
    max_shard_bytes: int = 5_000_000_000,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> PrunedExperts:
    """Write `model` without the experts that its `trace` says are chosen least, loadable with stock transformers.

    Every layer keeps the same number of experts, its own best ones: no stock architecture has a number for each layer.
    Each training domain of the trace counts alike. Shared experts, top_k and all other tensors stay.

    Args:
        model: a mixture in one of the architectures that `convert` writes, its folder or hub name.
        trace: what `trace` made of this very model, its file or folder; default: that of the run it lies in.
        keep, threshold, criterion: see `choose_experts`.
        domains: prepared domains, to measure perplexity on before and after; with seq_len, max_tokens, batch_size and
            threads as in `evaluate`.
        tokens: how many go through both models in the check.
        max_shard_bytes, force, dry_run: as in `convert`.

    Raises:
        UsageError: see `choose_experts`; or groups of experts that the router chooses between.
        InputError: no router, damaged, or a trace of another model.
        NumericalError: what was written does not compute what it should.
        ResourceError: not enough disk or memory, or the output folder is in use or not ours.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    started, out = time.monotonic(), Path(out)
    whole = Checkpoint.open(model, offline=offline)
    blocks = expert_blocks(whole)
    layers, num_experts = tuple(blocks), next(iter(blocks.values())).num_experts
    opened = trace if isinstance(trace, RoutingTrace) else RoutingTrace.open(trace or _trace_beside(whole.folder))
    _check_trace(opened, whole, layers=layers, num_experts=num_experts)
    places = [domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains]
    if places:
        check_fit(whole, places, seq_len=seq_len)
    plan = Plan.load(whole.folder / PLAN) if (whole.folder / PLAN).is_file() else None
    group = 1 if plan is None else max(layer.group for layer in plan.layers if layer is not None)
    choice = choose_experts(opened, keep=keep, threshold=threshold, criterion=criterion, group=group)
    kept = {layer: row.tolist() for layer, row in zip(layers, choice.kept, strict=True)}
    carried = remaining_plan(plan, kept) if plan is not None and carries_over(plan) else None
    output, parameters = _output(whole, kept, carried, opened, num_experts=num_experts, max_shard_bytes=max_shard_bytes)
    free = check_room(output, out)
    written, proof = Written("dry run", {}, 0), None
    perplexity: dict[str, dict[str, float]] = {}
    if not dry_run:
        written = write_folder(output, out, force=force, on_progress=on_progress)
        proof = compare_masked(whole, Checkpoint.open(out), kept, tokens=tokens, on_progress=on_progress).to_dict()
        if places:
            scores = evaluate(
                {"before": whole, "after": out},
                places,
                seq_len=seq_len,
                max_tokens=max_tokens,
                batch_size=batch_size,
                threads=threads,
                offline=offline,
                on_progress=on_progress,
            )
            for row in scores.scores:
                perplexity.setdefault(row.domain, {})[row.model] = row.perplexity
    removed_GL = choice.removed_GL
    receipt = PrunedExperts(
        out=str(out),
        model_type=str(whole.config["model_type"]),
        state=written.state,
        criterion=criterion,
        threshold=threshold,
        num_experts_before=num_experts,
        num_experts=choice.kept.shape[1],
        top_k=opened.top_k,
        layers=tuple(
            PrunedLayer(layer, tuple(row), tuple(sorted(set(range(num_experts)) - set(row))), float(share))
            for (layer, row), share in zip(kept.items(), removed_GL[choice.trained].mean(axis=0), strict=True)
        ),
        removed_share=float(removed_GL[choice.trained].mean()),
        removed_share_of=dict(zip(opened.domains, removed_GL.mean(axis=1).tolist(), strict=True)),
        parameters_before=sum(math.prod(info.shape) for info in whole.tensors.values()),
        parameters=parameters,
        perplexity=perplexity,
        proof=proof,
        trace=dict(opened.provenance),
        num_tensors=sum(len(shard.keys) for shard in output.shards),
        num_shards=len(output.shards),
        total_bytes=output.total_bytes,
        free_bytes=free,
        memory_bytes=output.memory_bytes,
        seconds=round(time.monotonic() - started, 3),
        warnings=tuple(_warnings(opened, choice, forgotten=plan is not None and carried is None)),
        files=written.files,
    )
    if not dry_run:
        write_json_atomic(out / RECEIPT, receipt.to_dict())
    return receipt


def _trace_beside(folder: Path) -> Path:
    places = [parent / "trace" / FILE for parent in folder.resolve().parents[:2]]
    found = next((path for path in places if path.is_file()), None)
    if found is None:
        raise InputError("no trace beside it", where=str(folder), needed="trace=FILE", hint="run prismoe trace on it")
    return found


def _check_trace(trace: RoutingTrace, whole: Checkpoint, *, layers: tuple[int, ...], num_experts: int) -> None:
    made_of = trace.provenance.get("model", {})
    found = made_of.get("fingerprint") if isinstance(made_of, dict) else None
    if found != whole.fingerprint or (trace.layers, trace.num_experts) != (layers, num_experts):
        raise InputError(
            f"a trace of another model ({str(found)[:12]}…)",
            where="trace",
            needed=f"one of {whole.folder} ({whole.fingerprint[:12]}…)",
            hint="run prismoe trace on it",
        )


def _output(
    whole: Checkpoint,
    kept: dict[int, list[int]],
    plan: Plan | None,
    trace: RoutingTrace,
    *,
    num_experts: int,
    max_shard_bytes: int,
) -> tuple[Output, int]:
    """The folder, and its number of parameters."""
    target = find_target(str(whole.config["model_type"]))
    remaining = len(next(iter(kept.values())))
    config = remaining_config(whole, num_experts=num_experts, remaining=remaining)
    recipes = remaining_recipes(whole, target, kept, num_experts=num_experts)
    settings = {"kept": {str(layer): row for layer, row in kept.items()}, "max_shard_bytes": max_shard_bytes}
    side_files = {path.name: path.read_bytes() for path in whole.side_files}
    plan_bytes = b"" if plan is None else plan.to_bytes()
    parents = {"source": whole.fingerprint, "trace": _hash(json.dumps(trace.to_dict(), sort_keys=True).encode())}
    output = Output(
        kind="prune-experts",
        checkpoint=whole,
        settings=settings,
        config=config,
        shards=lay_out(recipes, whole.tensors, max_shard_bytes=max_shard_bytes),
        files=side_files | ({PLAN: plan_bytes} if plan_bytes else {}),
        parents=parents | ({"plan": _hash(plan_bytes)} if plan_bytes else {}),
        key=job_key(whole, ["prune-experts", settings, config, parents], plan_bytes, side_files=side_files),
    )
    shapes = (recipe_tensor(recipe, whole.tensors, key=key)[1] for key, recipe in recipes.items())
    return output, sum(map(math.prod, shapes))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _warnings(trace: RoutingTrace, choice: Choice, *, forgotten: bool) -> Iterator[str]:
    if choice.wanted is not None and len(set(choice.wanted)) > 1:
        count, kept = choice.wanted, choice.kept.shape[1]
        yield (
            f"{min(count)} to {max(count)} experts of a layer reach the threshold and every layer keeps {kept}: stock "
            "architectures have one number of experts for all layers"
        )
    shares_GLE = choice.shares_GLE * trace.num_experts
    for row, kept in zip(range(len(trace.layers)), choice.kept, strict=True):
        shares_GLE[:, row, kept] = 0
    domain, row, expert = (int(place) for place in np.unravel_index(shares_GLE.argmax(), shares_GLE.shape))
    most = shares_GLE[domain, row, expert]
    if most > UNEVEN:
        what = f"{most:.1f} times its fair share of {trace.domains[domain]}"
        yield f"expert {expert} of layer {trace.layers[row]} goes and has {what}"
    if forgotten:
        yield "moe.plan was left behind: its draws go by the numbers that experts had"
