"""Carry hidden states of real text through dense and converted layers side by side and measure where they part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prismoe.checkpoint import FFN, Checkpoint
from prismoe.checkpoint.family import optional_tensor
from prismoe.checkpoint.tensorfile import ITEM_BYTES
from prismoe.errors import InputError
from prismoe.folder import Manifest, versions
from prismoe.plan import LayerPlan, Plan
from prismoe.progress import Progress
from prismoe.room import available_memory
from prismoe.targets import find_target
from prismoe.verify import reference, stock
from prismoe.verify.bits import changed_files, differing_from_recipes, not_carried
from prismoe.verify.certificate import Certificate, Check, LayerNumbers
from prismoe.verify.rest import outside
from prismoe.verify.sample import sample_ids

__all__ = ["certify"]

Array = npt.NDArray[Any]

LIMITS = {"input": 1e-6, "plan": 5e-6, "all_experts": 5e-6, "upcycled": 1e-6, "logits": 1e-4}
"""Relative Frobenius errors in float32; max |Δlogit| for logits up to 10 (in proportion above that)."""

FOLDING = {"BF16": 2.0**-8, "F16": 2.0**-10}
"""Added where a scale that is not a power of two is folded into weights of this dtype: one unit in the last place."""

MEANING = {
    "files": "files whose size or sha256 is not the manifest's",
    "recipes": "tensors that differ from their recipes carried out again",
    "carried": "tensors outside the experts that are not the source's, bit for bit",
    "loading": "keys missing, unexpected or mismatched in the stock class",
    "input": "FFN input of the stock MoE layer against the dense layer's, relative",
    "routing": "tokens for which the stock router does not keep the K largest logits",
    "plan": "stock FFN output against a float64 evaluation of the plan, relative",
    "all_experts": "all experts on, over the scale, against the dense FFN, relative",
    "upcycled": "upcycled FFN at the real K against the dense FFN, relative",
    "logits": "whole-model logits against the dense model's, max |Δ|",
}


@dataclass
class _Worst:
    """The worst number of each check so far, by its share of its limit; a number that is not finite is the worst."""

    found: dict[str, Check] = field(default_factory=dict)

    def add(self, name: str, measured: float, limit: float | None, where: str) -> None:
        check = Check(name, float(measured), limit, where if measured else "", MEANING[name])
        before = self.found.get(name)
        if before is None or _share(check) > _share(before):
            self.found[name] = check

    def count(self, name: str, names: list[str]) -> None:
        """Names that should not be there; counts add up and `where` keeps the first."""
        before = self.found.get(name)
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        total = len(names) + (before.measured if before else 0)
        where = before.where if before and before.where else shown
        self.found[name] = Check(name, float(total), 0.0, where, MEANING[name])


def _share(check: Check) -> float:
    if not math.isfinite(check.measured):
        return math.inf
    return check.measured / check.limit if check.limit else check.measured


def certify(
    moe: Checkpoint, dense: Checkpoint, plan: Plan, *, manifest: Manifest, tokens: int, key: str, on_progress: Progress
) -> Certificate:
    """All checks of `moe` against `dense` (with its branches: `Plan.sources`) and `plan`, pass or not; see `verify`."""
    config = dense.family
    ids, origin = sample_ids(moe.folder, num_tokens=min(tokens, config.max_positions), vocab_size=config.vocab_size)
    worst = _Worst()
    worst.count("files", changed_files(moe.folder, manifest, on_progress=on_progress))
    worst.count("recipes", differing_from_recipes(moe, dense, plan, manifest=manifest, on_progress=on_progress))
    worst.count("carried", not_carried(moe, outside(dense, plan), plan))
    chain = _Chain(moe, dense, _as_copies(plan), worst, manifest.config)
    layers = chain.run(torch.from_numpy(ids), on_progress=on_progress)
    return Certificate(
        source=dense.fingerprint,
        key=key,
        target=str(moe.config.get("model_type")),
        input=origin,
        num_tokens=len(ids),
        whole=chain.whole,
        checks=tuple(worst.found[name] for name in MEANING if name in worst.found),
        layers=tuple(layers),
        versions=versions(),
    )


def _as_copies(plan: Plan) -> Plan:
    """A plan of branches that never left the base is one of copies, and has to equal the base like one."""
    if not plan.branches or set(plan.branches) != {plan.origin.source}:
        return plan
    layers = (None if layer is None else replace(layer, donors=()) for layer in plan.layers)
    return replace(plan, layers=tuple(layers), rest=(0,))


class _Chain:
    """Two streams of hidden states: the dense model's, and the converted model's in the setting that must equal it.

    That setting is all experts on for a partition and the model as it is for copies and dense layers. A plan that
    shares, drops or changes neurons, or has those of several checkpoints, has none, and its second stream ends there.
    """

    def __init__(
        self, moe: Checkpoint, dense: Checkpoint, plan: Plan, worst: _Worst, settings: Mapping[str, Any]
    ) -> None:
        self.moe, self.dense, self.plan, self.worst = moe, outside(dense, plan), plan, worst
        self.donors = dense.donors
        self.gate = find_target(settings["target"]).gate
        self.ignored = [name for name in dense.tensors if optional_tensor(dense.family, name)]
        neurons = dense.family.intermediate_size
        self.kinds = ["dense" if layer is None else reference.kind(layer, num_neurons=neurons) for layer in plan.layers]
        if settings.get("absorb") and any(layer is not None and len(layer.shared) for layer in plan.layers):
            # With all experts on, the shared neurons that each of them holds would count E/scale times.
            self.kinds = ["sharing" if kind == "partition" else kind for kind in self.kinds]
        self.equal = {"sharing", "changed", "branches"}.isdisjoint(self.kinds) and all(
            plan is None or kind == "partition" or plan.scale == plan.group
            for plan, kind in zip(plan.layers, self.kinds, strict=True)
        )
        self.whole = "not reached"

    def run(self, ids_T: torch.Tensor, *, on_progress: Progress) -> list[LayerNumbers]:
        rows: list[LayerNumbers] = []
        ends, loading = stock.load_ends(self.dense, without=self.ignored)
        if loading.problems:
            raise InputError(f"stock class does not load it: {loading.problems[0]}", where=str(self.dense.folder))
        moe_ends, loading = stock.load_ends(self.moe)
        self.worst.count("loading", loading.problems)
        if loading.problems:
            return rows
        hidden_TD, equal_TD = ends.embed(ids_T), moe_ends.embed(ids_T)
        for layer in range(len(self.plan.layers)):
            on_progress("verify layers", layer, len(self.plan.layers))
            step = self._layer(layer, hidden_TD, equal_TD)
            if step is None:
                return rows
            row, hidden_TD, equal_TD = step
            rows.append(row)
        on_progress("verify layers", len(self.plan.layers), len(self.plan.layers))
        logits_TV = ends.logits(hidden_TD)
        if self.equal:
            self._logits(moe_ends.logits(equal_TD), logits_TV, "layer by layer")
        del ends, moe_ends
        self._load_whole(ids_T, logits_TV)
        return rows

    def _layer(
        self, layer: int, hidden_TD: torch.Tensor, equal_TD: torch.Tensor
    ) -> tuple[LayerNumbers, torch.Tensor, torch.Tensor] | None:
        """One layer of both models; None when the converted one does not load."""
        where, kind, layer_plan = f"layer {layer}", self.kinds[layer], self.plan.layers[layer]
        moe, loading = stock.load_layer(self.moe, layer)
        self.worst.count("loading", loading.problems)
        if loading.problems:
            return None
        dense, _ = stock.load_layer(self.dense, layer, without=self.ignored)
        expected, found = dense.run(hidden_TD), moe.run(hidden_TD)
        ffns = [self.dense.ffn(layer)] if layer_plan is None else [donor.ffn(layer) for donor in self.donors]
        x_TD = _float64(found.input_TD)
        gate_TE, wrong = np.ones((len(x_TD), 1)), None
        if layer_plan is not None and len(layer_plan.experts) > 1:  # one expert alone is always on, router or not
            gate_TE, wrong = self._gates(moe, found.input_TD, layer)
        planned_TD = _planned(x_TD, layer_plan, gate_TE, layer=layer, ffns=ffns)
        folding = 0.0 if layer_plan is None else _folding(layer_plan, self.dense, layer)
        row = LayerNumbers(
            layer=layer,
            kind=kind,
            input=_error(found.input_TD, expected.input_TD),
            plan=_error(found.output_TD, planned_TD),
            routing=wrong,
            all_experts=self._all_experts(moe, layer, expected) if kind == "partition" else None,
            upcycled=self._upcycled(moe, layer_plan, expected) if kind == "upcycling" and layer_plan else None,
            norm_ratio=float(found.output_TD.norm() / expected.output_TD.norm()),
        )
        for name in ("input", "plan", "all_experts", "upcycled"):
            if (measured := getattr(row, name)) is not None:
                self.worst.add(name, measured, LIMITS[name] + (0.0 if name == "input" else folding), where)
        if self.equal:
            with self._equal_setting([moe.module], [layer]):
                equal_TD = moe.run(equal_TD).hidden_TD
        return row, expected.hidden_TD, equal_TD

    def _gates(self, moe: stock.Layer, input_TD: torch.Tensor, layer: int) -> tuple[Array, int]:
        """[T, E] gates of the experts that the stock router keeps, and for how many tokens it keeps wrong ones."""
        rows_ED, chosen_TK = (_numpy(part) for part in moe.route(input_TD))
        logits_TE = _float64(input_TD) @ rows_ED.astype(np.float64).T
        wrong = reference.count_wrong_choices(logits_TE, chosen_TK)
        if chosen_TK.shape[1] != self.plan.top_k:
            wrong = len(chosen_TK)
        self.worst.add("routing", wrong, 0.0, f"layer {layer}")
        return reference.gates(logits_TE, chosen_TK, gate=self.gate), wrong

    def _all_experts(self, moe: stock.Layer, layer: int, expected: stock.FFNRun) -> float:
        with self._equal_setting([moe.module], [layer]):
            return _error(moe.ffn(expected.input_TD), expected.output_TD)

    def _upcycled(self, moe: stock.Layer, plan: LayerPlan, expected: stock.FFNRun) -> float:
        return _error(moe.ffn(expected.input_TD), plan.scale / plan.group * expected.output_TD)

    def _equal_setting(self, modules: list[torch.nn.Module], layers: list[int]) -> AbstractContextManager[None]:
        """All experts on in those of `modules` (layers `layers`) that are partitions: they then equal the dense FFN."""
        parts = [
            (module, len(plan.experts) / plan.scale)
            for module, layer in zip(modules, layers, strict=True)
            if self.kinds[layer] == "partition" and (plan := self.plan.layers[layer]) is not None
        ]
        return stock.all_experts_on([module for module, _ in parts], [factor for _, factor in parts])

    def _load_whole(self, ids_T: torch.Tensor, expected_TV: torch.Tensor) -> None:
        """Load the folder as a user does, where float32 weights and as much again fit into free memory."""
        size = 4 * sum(info.nbytes // ITEM_BYTES[info.dtype] for info in self.moe.tensors.values())
        free = available_memory()
        if free is None or 2 * size > free:
            has = "unknown" if free is None else f"{free / 1e9:.1f} GB"
            self.whole = f"not loaded whole: {2 * size / 1e9:.1f} GB of memory needed, {has} available"
            return
        model, loading = stock.load_whole(self.moe)
        self.worst.count("loading", loading.problems)
        self.whole = "loaded whole by AutoModelForCausalLM, remote code off"
        if loading.problems or not self.equal:
            return
        with self._equal_setting(list(model.model.layers), list(range(len(self.kinds)))), torch.no_grad():
            self._logits(model(input_ids=ids_T[None], use_cache=False).logits[0], expected_TV, "loaded whole")

    def _logits(self, found_TV: torch.Tensor, expected_TV: torch.Tensor, where: str) -> None:
        """Judged where folding the scale lost nothing; otherwise the number is only reported."""
        lossless = all(
            plan is None or _folding(plan, self.dense, layer) == 0.0 for layer, plan in enumerate(self.plan.layers)
        )
        limit = LIMITS["logits"] * max(1.0, float(expected_TV.abs().max()) / 10)
        self.worst.add("logits", float((found_TV - expected_TV).abs().max()), limit if lossless else None, where)


def _planned(x_TD: Array, plan: LayerPlan | None, gate_TE: Array, *, layer: int, ffns: Sequence[FFN]) -> Array:
    """[T, D] what the plan (None: a dense layer) computes on the dense weights (the base's first), in float64."""
    base = ffns[0]
    parts: dict[str, Array] = {"gate_FD": base.gate_FD, "up_FD": base.up_FD, "down_DF": base.down_DF}
    if plan is None:
        return reference.plan_ffn(x_TD, **parts)
    if reference.kind(plan, num_neurons=len(base.gate_FD)) in ("changed", "branches"):
        return reference.expert_by_expert(x_TD, plan, gate_TE, layer=layer, ffns=ffns)
    weight_TF = reference.neuron_weights(plan, gate_TE, num_neurons=len(base.gate_FD))
    return reference.plan_ffn(x_TD, **parts, weight_TF=weight_TF)


def _folding(plan: LayerPlan, dense: Checkpoint, layer: int) -> float:
    """Relative error that folding the scale into the matrices may cost: none for powers of two."""
    rounded = sum(math.frexp(factor)[0] != 0.5 for factor in plan.factors.values())
    return rounded * FOLDING.get(dense.tensors[f"model.layers.{layer}.mlp.down_proj.weight"].dtype, 0.0)


def _error(found: torch.Tensor | Array, expected: torch.Tensor | Array) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; 0 where both are zero."""
    found, expected = _float64(found), _float64(expected)
    difference, size = float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected))
    return difference / size if size else (0.0 if difference == 0.0 else math.inf)


def _numpy(tensor: torch.Tensor | Array) -> Array:
    return tensor.detach().cpu().numpy() if isinstance(tensor, torch.Tensor) else tensor


def _float64(tensor: torch.Tensor | Array) -> npt.NDArray[np.float64]:
    return _numpy(tensor).astype(np.float64)
