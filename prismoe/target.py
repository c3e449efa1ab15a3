"""A target says how a plan is spelled in one stock architecture: key names, config keys, and what it cannot hold.

`Target` is a table; the one interpreter for all of them is here. `lower` turns (checkpoint, plan, target) into
`{output key: Recipe}` and reads no weight. Config keys are all written, old and new spelling together and null
included, because readers differ in what they default (transformers' own writer drops `rope_theta`, and older
readers then load a silently wrong model).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, UsageError
from prismoe.family import DenseConfig, check_tensors, tensor_shapes
from prismoe.plan import LayerPlan, Plan, PlanShape, RouterDraw, plan_shape
from prismoe.recipe import Copy, Draws, Fill, IntArray, Recipe, Stack, Take

__all__ = ["Objection", "Rule", "Slot", "Target", "lower", "moe_config", "output_config", "padded"]

PAD_TO = 32
"""Widths are rounded up to this with zero neurons: stock CPU kernels need 8, llama.cpp's Q8_0 blocks need 32."""


@dataclass(frozen=True)
class Slot:
    """One output tensor: `key` with {l} (layer) and {e} (expert), holding `parts` (gate, up, down) stacked.

    A key of routed experts without {e} holds all experts, fused: [E, rows, columns].
    """

    key: str
    parts: tuple[str, ...]


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
    way; widths are the padded ones. `biases` are the attention projections that get a bias (zeros where the
    source has none) as soon as the source has any. The routed output's scale is folded into the matrices.
    Without a `router` it is the source's own architecture, and `config` the keys that change.
    """

    name: str
    architecture: str
    router: str
    experts: tuple[Slot, ...]
    config: Callable[[DenseConfig, PlanShape, int, int], dict[str, Any]]
    rules: tuple[Rule, ...]
    shared: tuple[Slot, ...] = ()
    biases: tuple[str, ...] = ()

    def objections(self, dense: DenseConfig, shape: PlanShape) -> tuple[Objection, ...]:
        """Every field that stands in the way; empty when the target holds the model exactly."""
        return tuple(
            Objection(rule.field, _shown(getattr(dense, rule.field, getattr(shape, rule.field, None))), rule.needed)
            for rule in self.rules
            if not rule.holds(dense, shape)
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
        **target.config(dense, shape, padded(shape.expert_width, pad_to), padded(shape.shared_width, pad_to)),
    }


def output_config(checkpoint: Checkpoint, shape: PlanShape, target: Target, *, pad_to: int = PAD_TO) -> dict[str, Any]:
    """config.json of the converted model: written from scratch, or the source's where its architecture stays."""
    if target.router:
        return moe_config(checkpoint.family, shape, target, pad_to=pad_to)
    width, shared_width = padded(shape.expert_width, pad_to), padded(shape.shared_width, pad_to)
    return {**checkpoint.config, **target.config(checkpoint.family, shape, width, shared_width)}


def lower(checkpoint: Checkpoint, plan: Plan, target: Target, *, pad_to: int = PAD_TO) -> dict[str, Recipe]:
    """How every tensor of the converted model is made, in the order in which a shard should hold them.

    Raises:
        UsageError: the target cannot express the plan on this checkpoint exactly; names every field in the way.
        InputError: tensors missing, unexpected or of a wrong shape; or the plan was made for another model.
    """
    dense, where = checkpoint.family, str(checkpoint.folder)
    check_tensors(dense, {name: info.shape for name, info in checkpoint.tensors.items()}, where=where)
    found = (len(plan.layers), plan.num_neurons, plan.hidden_size)
    if found != (needed := (dense.num_layers, dense.intermediate_size, dense.hidden_size)):
        raise InputError(
            f"a plan for (layers, neurons, hidden) = {found}", where=where, needed=f"{needed}", hint="make a new plan"
        )
    shape = plan_shape(plan)
    if objections := target.objections(dense, shape):
        raise UsageError("; ".join(map(str, objections)), where=f"{where}: target {target.name}")
    width, shared_width = padded(shape.expert_width, pad_to), padded(shape.shared_width, pad_to)
    recipes: dict[str, Recipe] = {}
    for name in _in_layer_order(checkpoint, dense):
        layer = _ffn_layer(name)
        layer_plan = None if layer is None else plan.layers[layer]
        if layer is None or layer_plan is None:
            recipes[name] = Copy(name)
        elif name.endswith(".gate_proj.weight"):
            dtype = checkpoint.tensors[name].dtype
            if target.router:
                recipes[target.router.format(l=layer)] = _router(layer_plan, layer, dense.hidden_size, dtype)
            block = _Block(dense, layer)
            for slot in target.experts:
                recipes.update(block.routed(slot, layer_plan, width, single=not target.router))
            for slot in target.shared if shape.shared_width else ():
                recipes[slot.key.format(l=layer)] = block.single(slot, layer_plan.shared, shared_width)
        if name.endswith("_proj.weight") and ".self_attn." in name and dense.qkv_bias:
            bias = name.removesuffix("weight") + "bias"
            if name.split(".")[-2][0] in target.biases and bias not in checkpoint.tensors:
                info = checkpoint.tensors[name]
                recipes[bias] = Fill((info.shape[0],), info.dtype)
    return recipes


@dataclass(frozen=True)
class _Block:
    """Recipes of one layer's feed-forward tensors."""

    dense: DenseConfig
    layer: int

    def routed(self, slot: Slot, plan: LayerPlan, width: int, *, single: bool = False) -> dict[str, Recipe]:
        """Recipes of all experts; `single`: there is one, and its tensor has no axis of experts."""
        if "{e}" in slot.key or single:
            return {
                slot.key.format(l=self.layer, e=e): self.single(slot, index, width, plan, expert=e)
                for e, index in enumerate(plan.experts)
            }
        parts = tuple(
            part for e, index in enumerate(plan.experts) for part in self._parts(slot, index, width, plan, expert=e)
        )
        shape = (len(plan.experts), *self._shape(slot, width))
        return {slot.key.format(l=self.layer): Stack(shape, parts)}

    def single(
        self, slot: Slot, index: IntArray, width: int, plan: LayerPlan | None = None, *, expert: int = 0
    ) -> Recipe:
        """One block of neurons: expert number `expert` of `plan`, or without a plan neurons as they are."""
        parts = self._parts(slot, index, width, plan, expert=expert)
        return parts[0] if len(parts) == 1 else Stack(self._shape(slot, width), parts)

    def _shape(self, slot: Slot, width: int) -> tuple[int, int]:
        hidden = self.dense.hidden_size
        return (hidden, width) if slot.parts == ("down",) else (len(slot.parts) * width, hidden)

    def _parts(
        self, slot: Slot, index: IntArray, width: int, plan: LayerPlan | None, *, expert: int
    ) -> tuple[Copy | Take, ...]:
        return tuple(
            self._part(
                part,
                index,
                width,
                1.0 if plan is None else plan.factors[part],
                None if plan is None else _draws(plan, part, layer=self.layer, expert=expert),
            )
            for part in slot.parts
        )

    def _part(self, part: str, index: IntArray, width: int, factor: float, draws: Draws | None) -> Copy | Take:
        source = f"model.layers.{self.layer}.mlp.{part}_proj.weight"
        neurons = self.dense.intermediate_size
        if len(index) == width == neurons and factor == 1.0 and draws is None:
            return Copy(source)  # upcycling moves whole tensors: the executor copies them inside the kernel
        return Take(source, 1 if part == "down" else 0, index, factor, width - len(index), draws)


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


def _in_layer_order(checkpoint: Checkpoint, dense: DenseConfig) -> Mapping[str, None]:
    """Names to carry over: everything expected, and a stored copy of a tied head; rotary tables are dropped."""
    names = dict.fromkeys(tensor_shapes(dense))
    if "lm_head.weight" in checkpoint.tensors:
        names["lm_head.weight"] = None
    return names


def _ffn_layer(name: str) -> int | None:
    return int(name.split(".")[2]) if ".mlp." in name else None


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
