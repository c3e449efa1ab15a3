"""Lowering: (checkpoint, plan, target) becomes `{output key: Recipe}`, the one interpreter of every target's table.

No weight is read here, so whatever cannot be expressed is refused before the first byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.branches import branch_key
from prismoe.checkpoint.family import Rows, check_tensors
from prismoe.errors import InputError, UsageError
from prismoe.plan import LayerPlan, Plan, RouterDraw, plan_shape
from prismoe.recipe import Copy, Draws, Fill, IntArray, Mean, Recipe, Stack, Take
from prismoe.target import PAD_TO, Constant, Slot, Target, absorbed, check_rows
from prismoe.targets import holder

__all__ = ["lower"]


def lower(
    checkpoint: Checkpoint, plan: Plan, target: Target, *, pad_to: int = PAD_TO, absorb: bool = False
) -> dict[str, Recipe]:
    """How every tensor of the converted model is made, in the order in which a shard should hold them.

    With `absorb` the shared neurons are appended to every expert, which is the same function because the weights of
    the kept experts sum to one: computed top_k times and stored num_experts times. The scale of the routed neurons
    then goes into their rows of up and gate, because columns of one down matrix have one factor.

    Of a plan with branches `checkpoint` is what `Plan.sources` gives.

    Raises:
        UsageError: the target cannot express the plan on this checkpoint exactly; names every field in the way, and
            a target that can.
        InputError: tensors missing, unexpected or of a wrong shape; or the plan was made for another model.
    """
    dense, where = checkpoint.family, str(checkpoint.folder)
    base = checkpoint.donors[0]
    check_tensors(dense, {name: info.shape for name, info in base.tensors.items()}, where=where)
    if len(checkpoint.donors) <= len(plan.branches):
        raise InputError(f"a plan of {len(plan.branches)} branches", where=where, needed="the branches: plan.sources")
    found = (len(plan.layers), plan.num_neurons, plan.hidden_size)
    if found != (needed := (dense.num_layers, dense.intermediate_size, dense.hidden_size)):
        raise InputError(
            f"a plan for (layers, neurons, hidden) = {found}", where=where, needed=f"{needed}", hint="make a new plan"
        )
    shape = absorbed(plan_shape(plan)) if absorb else plan_shape(plan)
    if objections := target.objections(dense, shape):
        other = holder(dense, shape)
        raise UsageError(
            "; ".join(map(str, objections)),
            where=f"{where}: target {target.name}",
            hint=f"{other} holds it" if other else "no target holds it",
        )
    if absorb and any(layer and (layer.noise or layer.redraw or layer.donors) for layer in plan.layers):
        raise UsageError(
            "absorb with experts that were changed", where=where, needed="experts of the base's unchanged neurons"
        )
    width, shared_width = target.widths(shape, pad_to=pad_to)
    check_rows(dense, target, width)
    zero_biases = target.zero_biases(dense)
    recipes: dict[str, Recipe] = {}
    for name, at in _in_layer_order(checkpoint, plan.rest).items():
        layer = _ffn_layer(name)
        layer_plan = None if layer is None else plan.layers[layer]
        dtype = checkpoint.tensors[at.source].dtype
        if layer is None or layer_plan is None:
            recipes[name] = _carried(at, plan.rest)
        elif name.endswith(".gate_proj.weight"):
            block = _Block(checkpoint.places, layer, layer_plan, absorb)
            if target.router:
                recipes[target.router.format(l=layer)] = _router(layer_plan, layer, dense.hidden_size, dtype)
            for slot in target.experts:
                recipes.update(block.routed(slot, width, single=not target.router))
            for slot in target.shared if shared_width else ():
                recipes[slot.key.format(l=layer)] = block.always_on(slot, shared_width, target.shared_factor, dtype)
            for constant in target.constants:
                recipes[constant.key.format(l=layer)] = _constant(constant, constant.size(dense, shape), dtype)
        if ".self_attn." in name and name.endswith("_proj.weight") and name.split(".")[-2][0] in zero_biases:
            recipes[name.removesuffix("weight") + "bias"] = Fill(at.shape[:1], dtype)
    return recipes


@dataclass(frozen=True)
class _Block:
    """Recipes of one layer's feed-forward tensors."""

    places: Mapping[str, Rows]
    layer: int
    plan: LayerPlan
    absorb: bool

    def routed(self, slot: Slot, width: int, *, single: bool) -> dict[str, Recipe]:
        """Recipes of all experts; `single`: there is one, and its tensor has no axis of experts."""
        experts = {e: self._expert(slot, e, width) for e in range(len(self.plan.experts))}
        if "{e}" in slot.key or single:
            return {
                slot.key.format(l=self.layer, e=e): _stacked(parts, self._shape(slot, width))
                for e, parts in experts.items()
            }
        shape = (len(experts), *self._shape(slot, width))
        return {
            slot.key.format(l=self.layer): Stack(shape, tuple(part for parts in experts.values() for part in parts))
        }

    def always_on(self, slot: Slot, width: int, factor: float, dtype: str) -> Recipe:
        """The shared expert; zero neurons where the plan has none."""
        shape = self._shape(slot, width)
        if self.absorb or not len(self.plan.shared):
            return Fill(shape, dtype)
        factors = {"gate": 1.0, "up": 1.0, "down": factor}
        parts = tuple(self._take(part, self.plan.shared, factors[part], width) for part in slot.parts)
        return _stacked(parts, shape)

    def _expert(self, slot: Slot, expert: int, width: int) -> tuple[Copy | Take | Fill, ...]:
        index, factors = self.plan.experts[expert], self.plan.factors
        donor = self.plan.donors[expert] if self.plan.donors else 0
        if not self.absorb:
            drawn = {part: _draws(self.plan, part, layer=self.layer, expert=expert) for part in slot.parts}
            return tuple(self._take(part, index, factors[part], width, drawn[part], donor=donor) for part in slot.parts)
        shared, rows = self.plan.shared, {"gate": factors["gate"], "up": factors["up"] * factors["down"]}
        found: list[Copy | Take | Fill] = []
        for part in slot.parts:
            if part == "down":
                found.append(self._take(part, np.concatenate([index, shared]), 1.0, width))
            else:
                found += [
                    self._take(part, index, rows[part], len(index)),
                    self._take(part, shared, 1.0, width - len(index)),
                ]
        return tuple(found)

    def _shape(self, slot: Slot, width: int) -> tuple[int, int]:
        hidden = self._place("down").shape[0]
        return (hidden, width) if slot.parts == ("down",) else (len(slot.parts) * width, hidden)

    def _place(self, part: str) -> Rows:
        return self.places[f"model.layers.{self.layer}.mlp.{part}_proj.weight"]

    def _take(
        self, part: str, index: IntArray, factor: float, width: int, draws: Draws | None = None, *, donor: int = 0
    ) -> Copy | Take:
        """Neurons `index` of one matrix of a checkpoint, then zero neurons up to `width`."""
        at, axis = self._place(part), 1 if part == "down" else 0
        source = branch_key(donor, at.source)
        if at.whole and len(index) == width == at.shape[axis] and factor == 1.0 and draws is None:
            return Copy(source)  # upcycling moves whole tensors
        return Take(source, axis, index + np.int32(at.start), factor, width - len(index), draws)


def _stacked(parts: tuple[Copy | Take | Fill, ...], shape: tuple[int, ...]) -> Recipe:
    return parts[0] if len(parts) == 1 else Stack(shape, parts)


def _carried(at: Rows, rest: tuple[int, ...]) -> Copy | Take | Mean:
    """A tensor outside the experts: the mean of the checkpoints `rest`, to the last bit where it is one."""
    keys = tuple(branch_key(number, at.source) for number in rest)
    if len(keys) > 1:
        return Mean(keys, at.start, at.shape[0])
    return Copy(keys[0]) if at.whole else Take(keys[0], 0, np.arange(at.start, at.start + at.shape[0], dtype=np.int32))


def _constant(constant: Constant, size: tuple[int, ...], dtype: str) -> Fill:
    rows = np.full(size, constant.value, np.float32) if constant.value else None
    return Fill(size, constant.dtype or dtype, rows=rows)


def _draws(plan: LayerPlan, part: str, *, layer: int, expert: int) -> Draws | None:
    """What is drawn in one matrix of one expert. Each matrix of each expert has a stream of its own."""
    redraw, noise, number = plan.redraw, plan.noise, ("gate", "up", "down").index(part)
    if redraw is None and noise is None:
        return None
    seed = (redraw or noise).seed  # type: ignore[union-attr]
    added = noise.std if noise is not None else 0.0
    if redraw is None:
        return Draws((seed, layer), 3 * expert + number, np.empty(0, np.int32), noise=added)
    mean, std = map(float, redraw.moments[expert, number])
    slots = redraw.slots[number % len(redraw.slots), expert]
    return Draws((seed, layer), 3 * expert + number, slots, mean=mean, std=std, noise=added)


def _router(plan: LayerPlan, layer: int, hidden_size: int, dtype: str) -> Fill:
    shape = (len(plan.experts), hidden_size)
    if isinstance(plan.router, RouterDraw):
        return Fill(shape, dtype, std=plan.router.std, key=(plan.router.seed, layer), repeat=plan.group)
    return Fill(shape, dtype, rows=plan.router)


def _in_layer_order(checkpoint: Checkpoint, rest: tuple[int, ...]) -> Mapping[str, Rows]:
    """What to carry over: everything expected, and a stored copy of a tied head; rotary tables are dropped."""
    places, head = dict(checkpoint.places), "lm_head.weight"
    stored = all(branch_key(number, head) in checkpoint.tensors for number in (0, *rest))
    if stored and head not in places:
        places[head] = Rows(head, 0, checkpoint.tensors[head].shape, whole=True)
    return places


def _ffn_layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".mlp." in name else None
