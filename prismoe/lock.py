"""One process at a time: lock files, which the kernel lets go when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from prismoe.errors import ResourceError
from prismoe.room import unwritten

__all__ = ["LOCK", "check_free", "hold", "hold_file"]

LOCK = ".prismoe.lock"
_PATIENCE = 1.0  # seconds in which who has the lock writes its number


@contextmanager
def hold(lock: Path, *, where: Path) -> Iterator[None]:
    """Hold the file `lock`, which protects `where`; it is there only as long as somebody holds it.

    Raises:
        ResourceError: another process holds it; names that.
        OSError: it cannot be made.
    """
    handle = _take(lock, where)
    try:
        yield
    finally:
        with suppress(OSError):  # on a disk that became read-only it stays, and protects nothing
            lock.unlink(missing_ok=True)
        os.close(handle)


def check_free(lock: Path, *, where: Path) -> None:
    """Before long work whose result goes to `where`: does another process hold it?

    Raises:
        ResourceError: it does.
    """
    try:
        handle = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # nobody does, or who takes it in earnest will say what is wrong
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(handle, where) from None
    finally:
        os.close(handle)


@contextmanager
def hold_file(path: Path) -> Iterator[None]:
    """Hold `path`, the single file that comes out; its folder is made.

    Raises:
        ResourceError: another process makes it; or the folder cannot be written.
    """
    with ExitStack() as held:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(hold(path.with_name(f".{path.name}.lock"), where=path))
        except OSError as error:
            raise unwritten(path, error) from error
        yield


def _take(lock: Path, where: Path) -> int:
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if not _locked(handle):
                raise _in_use(handle, where)
            # The holder unlinks the file before it lets go, so a lock on a file without a name protects nothing.
            if lock.exists() and os.fstat(handle).st_ino == lock.stat().st_ino:
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _locked(handle: int) -> bool:
    for wait in (0.02, 0.0):  # `check_free` has it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(wait)
    return False


def _in_use(handle: int, where: Path) -> ResourceError:
    deadline, pid = time.monotonic() + _PATIENCE, ""
    while not pid and time.monotonic() < deadline:
        pid = os.pread(handle, 32, 0).decode(errors="replace").strip()
        if not pid:
            time.sleep(0.01)
    return ResourceError(
        f"output {'folder' if where.is_dir() else 'file'} is in use by process {pid or 'unknown'}",
        where=str(where),
        hint="wait for it, or choose another --out",
    )
