"""Random numbers that are a function of where they are used: no generator, no state, no order.

A value depends on (seed, step, layer, number of the token in the step's global batch, expert) alone: it is the same
under any sharding or micro-batch, and when a layer is computed a second time in the backward pass. Counters go
through the finaliser of SplitMix64 (Steele et al. 2014), a bijection of 64 bits with full avalanche.
"""

from __future__ import annotations

import math

import torch

__all__ = ["normal", "uniform", "uniform_bits"]

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def uniform_bits(seed: int, step: int, layer: int, token_numbers_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """64 random bits for each token and expert, int64 [T, E]."""
    stream = 0
    for value in (seed, step, layer):
        stream = _finish_int((stream + value + 1) * _GOLDEN & _MASK)
    token_T = _finish(token_numbers_T * _signed(_GOLDEN) + _signed(stream))
    experts_E = torch.arange(1, num_experts + 1, device=token_numbers_T.device) * _signed(_GOLDEN)
    return _finish(token_T[:, None] + experts_E)


def uniform(seed: int, step: int, layer: int, token_numbers_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Numbers from the open interval (0, 1), float64 [T, E]."""
    bits_TE = uniform_bits(seed, step, layer, token_numbers_T, num_experts)
    return (_shifted(bits_TE, 12).double() + 0.5) * 2.0**-52


def normal(seed: int, step: int, layer: int, token_numbers_T: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Standard normal numbers, float32 [T, E] (Box-Muller)."""
    bits_TE = uniform_bits(seed, step, layer, token_numbers_T, num_experts)
    # The open interval (0, 1) needs float64: the largest of these values is 1 in float32.
    first_TE = (_shifted(bits_TE, 32).double() + 0.5) * 2.0**-32
    second_TE = ((bits_TE & 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    return (torch.sqrt(-2.0 * torch.log(first_TE)) * torch.cos(2.0 * math.pi * second_TE)).float()


def _finish(bits: torch.Tensor) -> torch.Tensor:
    bits = (bits ^ _shifted(bits, 30)) * _signed(_FIRST)
    bits = (bits ^ _shifted(bits, 27)) * _signed(_SECOND)
    return bits ^ _shifted(bits, 31)


def _finish_int(bits: int) -> int:
    bits = (bits ^ bits >> 30) * _FIRST & _MASK
    bits = (bits ^ bits >> 27) * _SECOND & _MASK
    return bits ^ bits >> 31


def _shifted(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift to the right: torch's is arithmetic."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _signed(value: int) -> int:
    """The int64 with the bits of `value`; its products wrap around as unsigned ones do."""
    return value - 2**64 if value >= 2**63 else value
