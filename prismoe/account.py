"""What a plan would come to, from config.json alone: parameters, arithmetic, bytes, time, and which targets take it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prismoe.checkpoint.family import DenseConfig, tensor_shapes
from prismoe.plan import PlanShape
from prismoe.target import PAD_TO, Objection, Target, absorbed, check_rows, padded
from prismoe.targets import all_targets, find_target

__all__ = ["Account", "account"]

ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
"""Bytes of a weight; 2 where config.json does not say."""
BYTES_PER_SECOND = 1e9
"""What the convert time is estimated with: reading and writing one gigabyte each second, a plain NVMe disk."""


@dataclass(frozen=True)
class Account:
    """Counts are of parameters. "Active" is what one token passes through: both embeddings, router, K experts, shared.

    Zero neurons that pad an expert's width are counted in `padding_parameters` and the bytes, nowhere else.
    `flops_per_token` is 2 per active weight of a matrix multiplication in a forward pass (attention scores, which
    grow with the context, and the embedding look-up not counted).
    """

    target: str
    dense_parameters: int
    total_parameters: int
    active_parameters: int
    padding_parameters: int
    ffn_active_percent: float  # of the converted model's own FFN weights
    ffn_active_percent_of_dense: float  # 200 for two copies of the dense FFN
    flops_per_token: int
    dense_flops_per_token: int
    disk_bytes: int
    ram_bytes: int  # to hold the weights in the checkpoint's dtype
    convert_seconds: float  # estimated at BYTES_PER_SECOND
    accepted_by: tuple[str, ...]
    objections: Mapping[str, tuple[Objection, ...]]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def account(
    dense: DenseConfig,
    shape: PlanShape,
    *,
    target: Target | str = "mixtral",
    pad_to: int = PAD_TO,
    absorb: bool = False,
) -> Account:
    """Account for a plan on a dense model as `target` would store it. Reads nothing.

    The other targets' verdicts are in `accepted_by` and `objections`.

    Raises:
        UsageError: an unknown target, or `pad_to` leaves a width that stock transformers cannot run.
    """
    if isinstance(target, str):
        target = find_target(target)
    notes = _notes(dense, shape, target, pad_to=pad_to, absorb=absorb)
    shape = absorbed(shape) if absorb else shape
    hidden, layers = dense.hidden_size, len(shape.moe_layers)
    sizes = {name: math.prod(dims) for name, dims in tensor_shapes(dense).items()}
    total_dense = sum(sizes.values())
    ffn = 3 * hidden * dense.intermediate_size
    router = shape.num_experts * hidden if target.router else 0
    routed, shared = 3 * hidden * shape.expert_width, 3 * hidden * shape.shared_width
    width, shared_width = target.widths(shape, pad_to=pad_to)
    check_rows(dense, target, width)
    wide, wide_shared = 3 * hidden * width - routed, 3 * hidden * shared_width - shared
    biases = _zero_biases(dense, target)
    constants = sum(math.prod(constant.size(dense, shape)) for constant in target.constants)
    total = total_dense + biases + layers * (shape.num_experts * routed + shared + router + constants - ffn)
    active = total - layers * (shape.num_experts - shape.top_k) * routed
    padding = layers * (shape.num_experts * wide + wide_shared)
    kept = (dense.num_layers - layers) * ffn
    ffn_active = kept + layers * (shape.top_k * routed + shared)
    vectors = sum(sizes[name] for name, dims in tensor_shapes(dense).items() if len(dims) == 1)
    head = dense.vocab_size * hidden if dense.tie_embeddings else 0
    embedding = dense.vocab_size * hidden
    read = total_dense + shape.num_branches * layers * ffn  # averaged attention and embeddings are little beside it
    item = ITEM_BYTES.get(dense.dtype or "", 2)
    disk = (total + padding) * item
    verdicts = {name: other.objections(dense, shape) for name, other in all_targets().items()}
    return Account(
        target=target.name,
        dense_parameters=total_dense,
        total_parameters=total,
        active_parameters=active,
        padding_parameters=padding,
        ffn_active_percent=100 * ffn_active / (kept + layers * (shape.num_experts * routed + shared)),
        ffn_active_percent_of_dense=100 * ffn_active / (dense.num_layers * ffn),
        flops_per_token=2 * (active - biases - vectors - embedding + head),
        dense_flops_per_token=2 * (total_dense - vectors - embedding + head),
        disk_bytes=disk,
        ram_bytes=disk,
        convert_seconds=(read * item + disk) / BYTES_PER_SECOND,
        accepted_by=tuple(name for name, found in verdicts.items() if not found),
        objections={name: found for name, found in verdicts.items() if found},
        notes=notes,
    )


def _zero_biases(dense: DenseConfig, target: Target) -> int:
    """Zero biases that the target wants and the source has not (Qwen2's output projection in Granite)."""
    heads = {"q": dense.num_heads, "k": dense.num_kv_heads, "v": dense.num_kv_heads}
    sizes = {name: count * dense.head_dim for name, count in heads.items()} | {"o": dense.hidden_size}
    return dense.num_layers * sum(sizes[name] for name in target.zero_biases(dense))


def _notes(dense: DenseConfig, shape: PlanShape, target: Target, *, pad_to: int, absorb: bool) -> tuple[str, ...]:
    notes = []
    if absorb and shape.shared_width:
        notes.append(
            f"the {shape.shared_width} shared neurons stand in every expert: computed {shape.top_k} times for a token "
            f"and stored {shape.num_experts} times"
        )
        shape = absorbed(shape)
    if target.gate == "sigmoid":
        notes.append(
            "its gates are sigmoids over their sum and not a softmax: the same experts, other shares, and the same "
            "model only where shares do not matter (copies, or router rows that are zero)"
        )
    width = padded(shape.expert_width, pad_to)
    if width != shape.expert_width:
        notes.append(
            f"experts of {shape.expert_width} neurons are stored {width} wide; the zero neurons change nothing"
        )
    if dense.dtype != "float32" and any(math.frexp(scale)[0] != 0.5 for scale in shape.scales):
        uneven = ", ".join(f"{scale:g}" for scale in shape.scales)
        notes.append(
            f"scale {uneven} is not a power of two: folding it rounds down_proj once in {dense.dtype or '16 bit'}"
        )
    return tuple(notes)
