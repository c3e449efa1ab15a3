"""A target says how a plan is spelled in one stock architecture: key names, config keys, and what it cannot hold.

`Target` is a table; the one interpreter for all of them is here. `lower` turns (checkpoint, plan, target) into
`{output key: Recipe}` and reads no weight. Config keys are all written, old and new spelling together and null
included, because readers differ in what they default (transformers' own writer drops `rope_theta`, and older
readers then load a silently wrong model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.branches import branch_key
from prismoe.checkpoint.family import DenseConfig, Rows, check_tensors
from prismoe.errors import InputError, UsageError
from prismoe.plan import LayerPlan, Plan, PlanShape, RouterDraw, plan_shape
from prismoe.recipe import Copy, Draws, Fill, IntArray, Mean, Recipe, Stack, Take

__all__ = [
    "Constant",
    "Objection",
    "Rule",
    "Slot",
    "Target",
    "absorbed",
    "check_rows",
    "lower",
    "moe_config",
    "output_config",
    "padded",
]

PAD_TO = 32
"""Widths are rounded up to this with zero neurons: stock CPU kernels need 8, llama.cpp's Q8_0 blocks need 32."""
ROW_BYTES = 16


@dataclass(frozen=True)
class Slot:
    """One output tensor: `key` with {l} (layer) and {e} (expert), holding `parts` (gate, up, down) stacked.

    A key of routed experts without {e} holds all experts, fused: [E, rows, columns].
    """

    key: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Constant:
    """One more tensor of a layer with experts: `size` numbers `value`, stored in the gate matrix's dtype or `dtype`."""

    key: str
    size: Callable[[DenseConfig, PlanShape], tuple[int, ...]]
    value: float = 0.0
    dtype: str = ""


@dataclass(frozen=True)
class Rule:
    """The target can hold what `holds(dense, shape)`; `field` is an attribute of either, named when it cannot."""

    field: str
    holds: Callable[[DenseConfig, PlanShape], bool]
    needed: str


@dataclass(frozen=True)
class Objection:
    """Why a target cannot express a plan on a checkpoint exactly."""

    field: str
    found: str
    needed: str

    def __str__(self) -> str:
        return f"{self.field} is {self.found}, needs {self.needed}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """One stock MoE architecture.

    `config(dense, shape, width, shared_width)` gives the keys that only this architecture has or names in its own
    way; widths are the padded ones. The routed output's scale is folded into the matrices. Without a `router` it is
    the source's own architecture, and `config` the keys that change.

    Attributes:
        block: the one way of putting a layer together that it has, see `Family`.
        multipliers: keys of the factors that it has.
        gate: what a kept expert is weighted with: "softmax" over the kept logits, or "sigmoid" of each over their sum.
        shared: the always-on expert; `shared_factor` goes into its down matrix (2 where the class halves it),
            `shared_unit` is what its width is a multiple of ("pad_to", or "expert": the width of an expert; "equal" is
            that very width), and `shared_always` whether there is no way without one (zero neurons then stand in).
        biases: the attention projections that get a bias (zeros where the source has none) as soon as the source has
            any, or with `biased_always` in any case.
        constants: tensors with nothing of the source in them.
    """

    name: str
    architecture: str
    router: str
    experts: tuple[Slot, ...]
    config: Callable[[DenseConfig, PlanShape, int, int], dict[str, Any]]
    rules: tuple[Rule, ...]
    block: str = "pre-norm"
    multipliers: tuple[str, ...] = ()
    gate: str = "softmax"
    shared: tuple[Slot, ...] = ()
    shared_factor: float = 1.0
    shared_unit: str = "pad_to"
    shared_always: bool = False
    biases: tuple[str, ...] = ()
    biased_always: bool = False
    constants: tuple[Constant, ...] = ()

    def objections(self, dense: DenseConfig, shape: PlanShape) -> tuple[Objection, ...]:
        """Every field that stands in the way; empty when the target holds the model exactly."""
        own = (
            Rule("block", lambda dense, shape: dense.block == self.block, f"{self.block}: how its layers are built"),
            Rule(
                "multipliers", lambda dense, shape: set(dense.multipliers) <= set(self.multipliers), "none but its own"
            ),
        )
        return tuple(
            Objection(rule.field, _shown(getattr(dense, rule.field, getattr(shape, rule.field, None))), rule.needed)
            for rule in (*(own if self.router else ()), *self.rules)
            if not rule.holds(dense, shape)
        )

    def widths(self, shape: PlanShape, *, pad_to: int = PAD_TO) -> tuple[int, int]:
        """Stored widths of a routed and of the shared expert, zero neurons included."""
        widest = max(shape.expert_width, shape.shared_width if self.shared_unit == "equal" else 0)
        width = padded(widest, pad_to)
        unit = pad_to if self.shared_unit == "pad_to" else width
        return width, padded(max(shape.shared_width, int(self.shared_always)), unit)

    def zero_biases(self, dense: DenseConfig) -> tuple[str, ...]:
        """Attention projections whose bias it wants and the source has not."""
        there = {"q": dense.qkv_bias, "k": dense.qkv_bias, "v": dense.qkv_bias, "o": dense.o_bias}
        return (
            tuple(name for name in self.biases if not there[name]) if any(there.values()) or self.biased_always else ()
        )


def check_rows(dense: DenseConfig, target: Target, width: int) -> None:
    """Stock transformers multiplies all experts at once (grouped_mm), which wants rows that are multiples of 16 bytes.

    A dtype that is not known counts as 16 bit.

    Raises:
        UsageError: experts `width` wide would load and then fail at their first token.
    """
    step = ROW_BYTES // {"float32": 4, "float64": 8}.get(dense.dtype or "", 2)
    if target.router and width % step:
        raise UsageError(
            f"experts {width} wide in {dense.dtype or '16 bit'}: stock transformers loads them and cannot run them",
            where="convert.pad_to",
            needed=f"a multiple of {step}",
            hint=f"convert.pad_to={PAD_TO}; zero neurons change nothing",
        )


def padded(width: int, pad_to: int = PAD_TO) -> int:
    """`width` rounded up to a multiple of `pad_to`."""
    return -(-width // pad_to) * pad_to


def moe_config(dense: DenseConfig, shape: PlanShape, target: Target, *, pad_to: int = PAD_TO) -> dict[str, Any]:
    """The whole config.json of the converted model."""
    rope = {"rope_theta": dense.rope_theta}
    scaling = dense.rope_scaling or {"rope_type": "default"}
    return {
        "architectures": [target.architecture],
        "model_type": target.name,
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "num_hidden_layers": dense.num_layers,
        "num_attention_heads": dense.num_heads,
        "num_key_value_heads": dense.num_kv_heads,
        "head_dim": dense.head_dim,
        "hidden_act": dense.activation,
        "max_position_embeddings": dense.max_positions,
        "rms_norm_eps": dense.rms_eps,
        **rope,
        "rope_scaling": dense.rope_scaling,
        "rope_parameters": {**scaling, **rope},
        "attention_bias": dense.qkv_bias,
        "attention_dropout": dense.attention_dropout,
        "sliding_window": dense.sliding_window,
        "tie_word_embeddings": dense.tie_embeddings,
        "initializer_range": dense.initializer_range,
        "use_cache": dense.use_cache,
        "bos_token_id": dense.bos_token_id,
        "eos_token_id": dense.eos_token_id,
        "pad_token_id": dense.pad_token_id,
        "dtype": dense.dtype,
        "torch_dtype": dense.dtype,
        "num_experts": shape.num_experts,
        "num_local_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
        **target.config(dense, shape, *target.widths(shape, pad_to=pad_to)),
    }


def output_config(checkpoint: Checkpoint, shape: PlanShape, target: Target, *, pad_to: int = PAD_TO) -> dict[str, Any]:
    """config.json of the converted model: written from scratch, or the source's where its architecture stays."""
    if target.router:
        return moe_config(checkpoint.family, shape, target, pad_to=pad_to)
    return {**checkpoint.config, **target.config(checkpoint.family, shape, *target.widths(shape, pad_to=pad_to))}


def absorbed(shape: PlanShape) -> PlanShape:
    """The shape of a plan whose shared neurons are appended to every expert."""
    return replace(shape, expert_width=shape.expert_width + shape.shared_width, shared_width=0)


def lower(
    checkpoint: Checkpoint, plan: Plan, target: Target, *, pad_to: int = PAD_TO, absorb: bool = False
) -> dict[str, Recipe]:
    """How every tensor of the converted model is made, in the order in which a shard should hold them.

    With `absorb` the shared neurons are appended to every expert, which is the same function because the weights of
    the kept experts sum to one: computed top_k times and stored num_experts times. The scale of the routed neurons
    then goes into their rows of up and gate, because columns of one down matrix have one factor.

    Of a plan with branches `checkpoint` is what `Plan.sources` gives.

    Raises:
        UsageError: the target cannot express the plan on this checkpoint exactly; names every field in the way.
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
        raise UsageError("; ".join(map(str, objections)), where=f"{where}: target {target.name}")
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


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
