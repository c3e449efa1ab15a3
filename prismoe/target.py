"""A target says how a plan is spelled in one stock architecture: key names, config keys, and what it cannot hold.

`Target` is a table; the one interpreter for all of them is `prismoe.lowering`. Config keys are all written, old and
new spelling together and null included, because readers differ in what they default (transformers' own writer drops
`rope_theta`, and older readers then load a silently wrong model).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import DenseConfig
from prismoe.errors import UsageError
from prismoe.plan import PlanShape

__all__ = [
    "Constant",
    "Objection",
    "Rule",
    "Slot",
    "Target",
    "absorbed",
    "check_rows",
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
    """One more tensor of a layer with experts: `size` numbers `value`, stored in the gate matrix's dtype or `dtype`.

    `experts_axis` is the axis that counts experts, None where the tensor knows nothing of them.
    """

    key: str
    size: Callable[[DenseConfig, PlanShape], tuple[int, ...]]
    value: float = 0.0
    dtype: str = ""
    experts_axis: int | None = None


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
        top_k_by_layer: the config key that can hold a number of experts a token for each layer, where there is one.
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
    top_k_by_layer: str = ""

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


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
