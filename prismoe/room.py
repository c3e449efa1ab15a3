"""Disk and memory compared with what a job needs, before its first byte."""

from __future__ import annotations

import shutil
from pathlib import Path

from prismoe.errors import ResourceError

__all__ = ["available_memory", "require_room"]

HINT = "free some space, or choose --out"


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # not Linux: nothing to compare with
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def require_room(out: Path, *, disk_bytes: int, memory_bytes: int = 0, hint: str = HINT) -> int:
    """Refuse a job that the disk of `out` or the memory of this machine cannot hold; returns the disk's free bytes.

    Raises:
        ResourceError: naming what is there and what is needed.
    """
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if disk_bytes > free:
        raise ResourceError(f"{_size(free)} of disk free", where=str(out), needed=_size(disk_bytes), hint=hint)
    available = available_memory()
    if available is not None and memory_bytes > available:
        needed = f"about {_size(memory_bytes)}"
        raise ResourceError(f"{_size(available)} of memory available", where=str(out), needed=needed)
    return free


def _size(count: int) -> str:
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"
