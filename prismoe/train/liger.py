"""Liger's fused experts as one more entry of the library's table, where the package is installed (a CUDA device)."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

__all__ = ["has_liger", "liger_experts"]


def has_liger() -> bool:
    """Whether the package is there."""
    return find_spec("liger_kernel") is not None


def liger_experts(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Forward pass of a stock module of experts, as `experts.sorted_experts` has it.

    Raises:
        ImportError: the installed version has no fused experts.
        ValueError: experts that are not plain ones with SiLU, or shared out over processes.
    """
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # type: ignore[import-not-found]

    plain = self.has_gate and self.is_concatenated and self.config.hidden_act == "silu"
    if not plain or self.is_transposed or self.has_bias or self.has_post_expert_norm or self._is_expert_parallel:
        raise ValueError("only plain experts with SiLU")
    out: torch.Tensor = LigerFusedMoEFunction.apply(
        hidden_states, self.gate_up_proj, self.down_proj, top_k_index.int(), top_k_weights
    )
    return out.to(hidden_states.dtype)
