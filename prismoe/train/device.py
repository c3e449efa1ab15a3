"""Settings of the CPU that belong to the process: set while a context is open, put back behind it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prismoe.errors import NumericalError

__all__ = ["matmul_kernel", "num_threads", "product_error"]

_LARGEST_ERROR = 1e-5


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def matmul_kernel(*, fast: bool) -> Iterator[None]:
    """Let float32 matrix products take oneDNN's kernel when `fast`; it must still compute in float32.

    torch's switch is called "medium" precision, which on CPUs with AMX really is bfloat16: hence the trial.

    Raises:
        NumericalError: the fast kernel differs from float64 by more than 1e-5 relative.
    """
    if not fast:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = product_error()
        if error > _LARGEST_ERROR:
            raise NumericalError(
                f"float32 matrix products are off by {error:.1e} (relative)",
                where="pretrain.fast_matmul",
                needed=f"at most {_LARGEST_ERROR:g}",
                hint="this CPU computes them in bfloat16; set fast_matmul=false",
            )
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def product_error() -> float:
    """How far a float32 product is from float64 now, relative."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    return float((left @ right.T - exact).norm() / exact.norm())
