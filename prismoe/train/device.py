"""Settings of the CPU that belong to the process: set while a context is open, put back behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from prismoe.errors import NumericalError

__all__ = [
    "least_seconds",
    "matmul_kernel",
    "matmul_precision",
    "num_threads",
    "product_error",
    "product_rate",
    "seed_draws",
]

_LARGEST_ERROR = 1e-5


def seed_draws(seed: int, device: torch.device) -> None:
    """Let what is drawn on `device` from here on depend on `seed` alone, often enough to be called at each step.

    On a CPU `torch.manual_seed` also leaves a note for every kind of device that may come later, with the call stack
    in it: half a millisecond, and a thousand times the seeding.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Compute with `count` threads; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_precision() -> str | None:
    """How float32 products are computed, by torch's old switch; None where its newer ones say what that cannot."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _newer() -> tuple[Any, Any]:
    """The switches of matrix products that the old one sets: oneDNN's and CUDA's."""
    backends: Any = torch.backends
    return backends.mkldnn.matmul, backends.cuda.matmul


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
    before = matmul_precision()
    newer = [(switch, switch.fp32_precision) for switch in _newer()]
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
        torch.set_float32_matmul_precision(before or "highest")
        if before is None:
            for switch, precision in newer:
                switch.fp32_precision = precision


def product_error() -> float:
    """How far a float32 product is from float64 now, relative."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = left.double() @ right.double().T
    return float((left @ right.T - exact).norm() / exact.norm())


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two 768 × 768 matrices of `dtype`, as this process computes now: what it could reach.

    Of CPU time, of which a busy machine takes nothing. Measured once for each way of computing, a tenth of a second.
    """
    precision = matmul_precision() or _newer()[0].fp32_precision
    return _product_rate(dtype, torch.get_num_threads(), precision)


@cache
def _product_rate(dtype: torch.dtype, threads: int, _: str) -> float:
    size = 768
    draw = torch.Generator().manual_seed(0)  # nobody else's numbers
    left, right = (torch.rand(size, size, generator=draw).to(dtype) for _ in range(2))
    return threads * 2 * size**3 / least_seconds(lambda: left @ right)


def least_seconds(work: Callable[[], object], *, times: int = 5) -> float:
    """Least CPU seconds of `work`, after a first time that is not counted."""
    work()
    found = []
    for _ in range(times):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return max(min(found), 1e-9)
