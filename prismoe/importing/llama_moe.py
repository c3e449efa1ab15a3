"""The released LLaMA-MoE layout (`llama_moe`): its config, its tensors, and how a stock mixture is made of them.

Written from the format alone (Zhu et al., 2406.16554, and the checkpoints' headers): none of its code is run, and no
default of its config class is relied on, because releases and class differ. Forward:
y = scale · Σ over the top-k of softmax(kept logits) · expert, with logits = W₂·tanh(W₁·x), or W·x for a linear router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig, dense_config, optional_tensor, tensor_shapes
from prismoe.errors import InputError
from prismoe.plan import PlanShape
from prismoe.recipe import Copy, Fill, Recipe, Take

__all__ = ["MODEL_TYPE", "LlamaMoe", "mixtral_recipes", "read_llama_moe"]

MODEL_TYPE = "llama_moe"
MLP = "model.layers.{l}.mlp"
GATE = f"{MLP}.gate.gate_network"
EXPERT = MLP + ".calculator.experts.weight_{part}.{e}"
# What the released models say, and the only thing that the softmax of a stock mixture can say.
FIXED: dict[str, Any] = {
    "gate_type": "TopKBalancedNoisyGate",
    "gate_use_softmax": True,
    "calculator_type": "UniversalCalculator",
    "multiply_gate_scores": True,
    "add_weight_norm": False,
}
NEEDED = ("rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "num_key_value_heads")

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LlamaMoe:
    """`dense` is the model without its experts, `widths` [L][E] their neurons, `scales` [L] factors of the output."""

    dense: DenseConfig
    num_experts: int
    top_k: int
    widths: tuple[tuple[int, ...], ...]
    scales: tuple[float, ...]
    linear: bool

    @property
    def shape(self) -> PlanShape:
        """Its numbers as those of a plan."""
        layers = range(self.dense.num_layers)
        width = max(max(row) for row in self.widths)
        scales = tuple(sorted(set(self.scales)))
        return PlanShape(len(layers), tuple(layers), self.num_experts, self.top_k, width, 0, scales)

    def router_keys(self, layer: int) -> tuple[str, ...]:
        """The matrices of a layer's router, the input side first."""
        gate = GATE.format(l=layer)
        return (f"{gate}.weight",) if self.linear else (f"{gate}.0.weight", f"{gate}.2.weight")


def read_llama_moe(checkpoint: Checkpoint) -> LlamaMoe:
    """Config and tensor headers, compared with each other; reads no weight.

    Raises:
        InputError: another model_type, a setting that a stock mixture cannot hold, or tensors that do not fit it.
    """
    config, where = checkpoint.config, str(checkpoint.folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise InputError(f"model_type {config.get('model_type')!r}", where=where, needed=MODEL_TYPE)
    for key, needed in FIXED.items():
        if config.get(key) != needed:
            raise InputError(f"{config.get(key)!r}", where=f"{where}: {key}", needed=f"{needed!r}")
    for key in NEEDED:
        if config.get(key) is None:
            raise InputError("missing", where=f"{where}: {key}", needed="a value: released models and class differ")
    network = config.get("gate_network")
    if network not in ("mlp", "linear"):
        raise InputError(f"{network!r}", where=f"{where}: gate_network", needed="'mlp' or 'linear'")
    dense = dense_config({**config, "model_type": "llama"}, where=where)
    dense = replace(dense, dtype=dense.dtype or "bfloat16")
    count, top_k = _count(config, "num_experts", where), _count(config, "num_selects", where)
    if top_k > count:
        raise InputError(f"{top_k} of {count} experts", where=f"{where}: num_selects", needed=f"at most {count}")
    found = LlamaMoe(
        dense=dense,
        num_experts=count,
        top_k=top_k,
        widths=_widths(config, dense, count, where),
        scales=_scales(config.get("score_scale_factor"), dense.num_layers, where),
        linear=network == "linear",
    )
    _check_tensors(checkpoint, found)
    return found


def _count(config: Mapping[str, Any], key: str, where: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value <= 4096:
        raise InputError(f"{value!r}", where=f"{where}: {key}", needed="a positive whole number")
    return value


def _widths(config: Mapping[str, Any], dense: DenseConfig, count: int, where: str) -> tuple[tuple[int, ...], ...]:
    value = config.get("size_experts")
    rows = value if isinstance(value, list) and len(value) == dense.num_layers else []
    good = [
        isinstance(row, list) and len(row) == count and all(type(width) is int and width > 0 for width in row)
        for row in rows
    ]
    if not good or not all(good):
        needed = f"{dense.num_layers} lists of {count} positive whole numbers"
        raise InputError(f"{value!r}"[:60], where=f"{where}: size_experts", needed=needed)
    return tuple(tuple(row) for row in rows)


def _scales(value: Any, num_layers: int, where: str) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * num_layers
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e6]
    if len(numbers) != num_layers:
        needed = f"a number above 0, or {num_layers} of them"
        raise InputError(f"{value!r}"[:60], where=f"{where}: score_scale_factor", needed=needed)
    return tuple(numbers)


def layout(model: LlamaMoe) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released layout with its shape, rotary tables and noise rows included."""
    d, e = model.dense.hidden_size, model.num_experts
    shapes = {name: shape for name, shape in tensor_shapes(model.dense).items() if ".mlp." not in name}
    for layer, widths in enumerate(model.widths):
        at = f"model.layers.{layer}"
        shapes[f"{at}.self_attn.rotary_emb.inv_freq"] = (model.dense.head_dim // 2,)
        shapes[f"{at}.mlp.gate.weight_noise.weight"] = (e, d)
        for key, shape in zip(model.router_keys(layer), ((e, d), (e, e)), strict=False):
            shapes[key] = shape
        for expert, width in enumerate(widths):
            for part in ("gate", "up", "down"):
                shape = (d, width) if part == "down" else (width, d)
                shapes[EXPERT.format(l=layer, e=expert, part=part)] = shape
    return shapes


def _ignored(model: LlamaMoe, name: str) -> bool:
    """Tensors that only training or old readers look at."""
    return optional_tensor(model.dense, name) or name.endswith(".mlp.gate.weight_noise.weight")


def _check_tensors(checkpoint: Checkpoint, model: LlamaMoe) -> None:
    if not checkpoint.has_weights:
        raise InputError("config.json without weights", where=str(checkpoint.folder), needed="model.safetensors")
    expected, where = layout(model), str(checkpoint.folder)
    missing = [name for name in expected if name not in checkpoint.tensors and not _ignored(model, name)]
    extra = [name for name in checkpoint.tensors if name not in expected and not _ignored(model, name)]
    for what, names in (("missing", missing), ("unexpected", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{what} tensor {min(names)}{more}", where=where, needed="what config.json describes")
    for name, shape in expected.items():
        if name in checkpoint.tensors and checkpoint.tensors[name].shape != shape:
            found = f"shape {list(checkpoint.tensors[name].shape)}"
            raise InputError(found, where=f"{where}: {name}", needed=f"{list(shape)}")


def mixtral_recipes(
    checkpoint: Checkpoint, model: LlamaMoe, rows: list[Rows] | None, *, width: int
) -> dict[str, Recipe]:
    """How every tensor of the Mixtral model is made: the scale in w2, experts ended by zero neurons up to `width`.

    `rows` are [E, D] router rows of each layer; None stands in for rows that are not fitted yet.
    """
    recipes: dict[str, Recipe] = {}
    for name in tensor_shapes(model.dense):
        if ".mlp." not in name:
            recipes[name] = Copy(name)
        elif name.endswith(".gate_proj.weight"):
            layer = int(name.split(".")[2])
            at = f"model.layers.{layer}.block_sparse_moe"
            dtype = checkpoint.tensors[model.router_keys(layer)[0]].dtype
            shape = (model.num_experts, model.dense.hidden_size)
            own = Copy(model.router_keys(layer)[0]) if model.linear else None
            recipes[f"{at}.gate.weight"] = own or Fill(shape, dtype, rows=None if rows is None else rows[layer])
            for expert, own_width in enumerate(model.widths[layer]):
                index, pad = np.arange(own_width, dtype=np.int32), width - own_width
                for ours, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
                    factor = model.scales[layer] if part == "down" else 1.0
                    source = EXPERT.format(l=layer, e=expert, part=part)
                    key = f"{at}.experts.{expert}.{ours}.weight"
                    recipes[key] = Take(source, int(part == "down"), index, factor, pad)
    if model.dense.tie_embeddings and "lm_head.weight" in checkpoint.tensors:
        recipes["lm_head.weight"] = Copy("lm_head.weight")
    return recipes
