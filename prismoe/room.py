"""Disk and memory compared with what a job needs, before its first byte; and what to say where that was not enough."""

from __future__ import annotations

import errno
import re
import resource
import shutil
from pathlib import Path, PurePosixPath

from prismoe.errors import ResourceError

__all__ = ["available_memory", "exhausted", "group_memory", "require_room", "unwritten"]

HINT = "free some space, or choose --out"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def available_memory() -> int | None:
    """Bytes that can be had without swapping, within the limits set to this process; None where nothing says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # not Linux: nothing to compare with
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(limit - int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize())
    found += group_memory()
    return max(min(found), 0) if found else None


# Of the second version of control groups, and of the first: folder, limit, what is used, and what of that is spare.
_GROUPS = (
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def group_memory(*, root: Path = Path("/sys/fs/cgroup"), me: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group that this process is in and that has a limit: of a container, of a batch job."""
    try:
        rows = [line.split(":", 2) for line in me.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for kind, most, used, spare in _GROUPS:
        path = next((PurePosixPath(row[2]) for row in rows if row[1] == kind), None)
        for group in (path, *path.parents) if path is not None else ():
            folder = root / kind / group.relative_to("/")
            try:
                limit = (folder / most).read_text().strip()
                if limit == "max":
                    continue
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                found.append(int(limit) - int((folder / used).read_text()) + int(stat.get(spare, 0)))
            except (OSError, ValueError):
                continue  # not shown to this process, or the group of all
    return found


def require_room(out: Path, *, disk_bytes: int, memory_bytes: int = 0, hint: str = HINT) -> int:
    """Refuse a job that the disk of `out` or the memory of this machine cannot hold; returns the disk's free bytes.

    Raises:
        ResourceError: naming what is there and what is needed.
    """
    total, _, free = shutil.disk_usage(_existing(out))
    if disk_bytes > free and total:  # some disks behind a network do not say how large they are
        raise ResourceError(f"{_size(free)} of disk free", where=str(out), needed=_size(disk_bytes), hint=hint)
    available = available_memory()
    if available is not None and memory_bytes > available:
        needed = f"about {_size(memory_bytes)}"
        raise ResourceError(f"{_size(available)} of memory available", where=str(out), needed=needed)
    return free


def unwritten(path: Path, error: BaseException, *, size: int = 0, what: str = "cannot write") -> ResourceError:
    """What to raise where `path`, of `size` bytes if that is known, could not be written.

    On a full disk the error says what is free and what was needed. `error` is an OSError, or says its number as
    libraries do that pass one on.
    """
    number = getattr(error, "errno", None)
    if number is None and (found := re.search(r"(?:os error |Errno )(\d+)", str(error))):
        number = int(found[1])
    reason = (getattr(error, "strerror", None) or str(error)).replace(f"[Errno {number}] ", "")
    if number not in FULL:
        return ResourceError(f"{what}: {reason}", where=str(path))
    if number == errno.ENOSPC:
        reason += f", {_size(shutil.disk_usage(_existing(path)).free)} of disk free"
    needed = _size(size) if size else "more"
    return ResourceError(f"{what}: {reason}", where=str(path), needed=needed, hint="free some space and run it again")


_NO_MEMORY = re.compile("allocate memory|out of memory|start new thread|bad_alloc|Unable to allocate", re.IGNORECASE)


def exhausted(error: BaseException) -> ResourceError | None:
    """What to raise for an error that says that there was not enough memory, None for any other."""
    text = " ".join(str(error).split())
    number = getattr(error, "errno", None)
    if not isinstance(error, MemoryError) and number != errno.ENOMEM and not _NO_MEMORY.search(text):
        return None
    left = available_memory()
    found = "out of memory" if left is None else f"out of memory, {_size(left)} available"
    found += f" ({text[:300]})" if text else ""
    return ResourceError(found, hint="prismoe VERB --dry-run estimates what is needed")


def _existing(path: Path) -> Path:
    return next(path for path in (path.absolute(), *path.absolute().parents) if path.is_dir())


def _size(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"
