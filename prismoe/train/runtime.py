"""What a command sets in its process for speed on a CPU, what it says of it, and what would help here.

Nothing is set on import, nothing that the config did not ask for, and all of it is put back. Two things are worth
asking for (P17; figures in docs/benchmarks.md): oneDNN's float32 products where MKL's are slower, and freed memory that
stays with the process, as a large tensor is otherwise taken from the system anew, page by page.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from prismoe.errors import NumericalError
from prismoe.train.device import least_seconds, matmul_kernel, num_threads, product_error, product_rate

__all__ = ["Lever", "kept_memory", "levers", "runtime"]

# mallopt(3); what is put back is where glibc's own adjustment ends up: it is over once a value was set by hand.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1))
_USUAL = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))
_WORTH = 1.1  # times as fast


@contextmanager
def runtime(*, threads: int = 0, fast_matmul: bool = False, keep_memory: bool = False) -> Iterator[dict[str, Any]]:
    """Set what is asked for while the context is open; yields what was set, for a receipt.

    Args:
        threads: of torch; 0 leaves the number.
        fast_matmul: see `device.matmul_kernel`.
        keep_memory: see `kept_memory`.

    Raises:
        NumericalError: the fast float32 product is not one of float32.
    """
    with num_threads(threads), matmul_kernel(fast=fast_matmul), kept_memory(keep=keep_memory) as kept:
        yield {"fast_matmul": fast_matmul, "keep_memory": kept}


@contextmanager
def kept_memory(*, keep: bool) -> Iterator[bool]:
    """Let the process keep memory that it frees, for the next tensor; yields whether that was set.

    Only glibc can be told; under another C library nothing happens. What is held at most does not grow, but it is
    given back at the end of the context instead of after every large tensor.
    """
    library = _glibc() if keep else None
    if library is None:
        yield False
        return
    for option, value in _KEEP:
        library.mallopt(option, value)
    try:
        yield True
    finally:
        for option, value in _USUAL:
            library.mallopt(option, value)
        library.malloc_trim(0)


def _glibc() -> Any:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


@dataclass(frozen=True)
class Lever:
    """One of the two: `setting` of the config, `before` and `after` in the same `unit`, and how exact it is."""

    setting: str
    before: float
    after: float
    unit: str
    note: str = ""
    allowed: bool = True

    @property
    def gain(self) -> float:
        """How many times as fast."""
        return self.after / self.before

    @property
    def helps(self) -> bool:
        return self.allowed and self.gain >= _WORTH

    def __str__(self) -> str:
        verdict = "would help" if self.helps else "would not help" if self.allowed else "must not be used"
        note = f", {self.note}" if self.note else ""
        return f"{self.setting}=true {verdict}: {self.before:.1f} to {self.after:.1f} {self.unit}{note}"


def levers() -> list[Lever]:
    """Try both on one thread, about half a second; everything is put back."""
    with num_threads(1):
        return [_fast_matmul(), _keep_memory()]


def _fast_matmul() -> Lever:
    def rate() -> float:
        return product_rate(torch.float32) / 1e9

    before = after = rate()
    try:
        with matmul_kernel(fast=True):
            error, after = product_error(), rate()
        note, allowed = f"off by {error:.0e}", True
    except NumericalError as inexact:
        note, allowed = inexact.found, False
    return Lever("pretrain.fast_matmul", before, after, "GFLOP/s of float32", note, allowed)


def _keep_memory() -> Lever:
    size = 48 << 20  # more than glibc ever keeps by itself

    def rate() -> float:
        return size / 1e9 / least_seconds(lambda: torch.empty(size, dtype=torch.uint8).fill_(1))

    before = rate()
    with kept_memory(keep=True) as kept:
        after = rate() if kept else before
    return Lever("pretrain.keep_memory", before, after, "GB/s into new tensors", "" if kept else "needs glibc")
