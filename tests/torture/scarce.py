"""Disks that fill up or become read-only, quotas, limits of memory and of file sizes: real ones wherever that can be.

A process gets a disk of its own by a mount namespace (`own_disk`), which another program then fills (`fill`). What
needs other hardware or an administrator is injected below the calls that change the disk (`disk.py`): quotas, and disks
that the kernel makes read-only while they are written.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import stat
from pathlib import Path

__all__ = [
    "DISK_BYTES",
    "fail",
    "fill",
    "free_again",
    "limit_memory",
    "locked",
    "own_disk",
    "remount",
    "without_privileges",
]

DISK_BYTES = 64 << 20
BALLAST = "ballast"
# What needs no room succeeds on a full disk.
FREES = ("unlink", "remove", "rmdir", "truncate", "ftruncate", "open")
_NEW_NS, _NEW_USER, _PRIVATE, _READ_ONLY, _REMOUNT, _RECURSIVE = 0x20000, 0x10000000, 1 << 18, 1, 32, 1 << 14
_CAPABILITIES_3 = 0x20080522
# As they are before anything is watched.
_open, _close, _fallocate = os.open, os.close, os.posix_fallocate


def _call(name: str, *args: object) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def own_disk(folder: Path, *, size: int = DISK_BYTES) -> str:
    """Mount an empty disk of `size` bytes in memory on `folder`, for this process and those it forks; or why not.

    It is gone with the last of them. Someone who is not root is it in a namespace of users, where that is allowed.
    """
    user, group = os.geteuid(), os.getegid()
    try:
        _call("unshare", _NEW_NS | (_NEW_USER if user else 0))
        if user:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        _call("mount", b"none", b"/", None, _PRIVATE | _RECURSIVE, None)
        folder.mkdir(exist_ok=True)
        _call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())
    except OSError as error:
        return str(error)
    return ""


def remount(folder: Path, *, read_only: bool) -> None:
    """Make a disk of `own_disk` read-only, or writable again."""
    _call("mount", b"none", os.fsencode(folder), None, _REMOUNT | (_READ_ONLY if read_only else 0), None)


def fill(folder: Path, *, leave: int) -> None:
    """Another program takes what is free on the disk of `folder`, but for `leave` bytes."""
    found = os.statvfs(folder)
    take = found.f_bavail * found.f_frsize - leave
    if take > 0:
        handle = _open(folder / BALLAST, os.O_WRONLY | os.O_CREAT)
        try:
            _fallocate(handle, 0, take)
        finally:
            _close(handle)


def free_again(folder: Path) -> None:
    """What `fill` took."""
    (folder / BALLAST).unlink(missing_ok=True)


def fail(number: int, name: str, path: str) -> None:
    """A step that meets a full disk, a quota or a read-only disk, by the error `number`.

    Raises:
        OSError: that, unless this step still works then.
    """
    if number == errno.EROFS or name not in FREES:
        raise OSError(number, os.strerror(number), path)


def limit_memory(more: int) -> None:
    """No more address space than this process has by now and `more` bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def without_privileges() -> None:
    """Root, too, keeps to the permissions of files from now on. For a process that ends soon."""
    header, nothing = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0), (ctypes.c_uint32 * 6)()
    _call("capset", header, nothing)


def locked(folder: Path, *, locked: bool) -> None:
    """Nothing can be made in `folder` by who keeps to permissions, or again."""
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(stat.S_IRUSR | stat.S_IXUSR | (0 if locked else stat.S_IWUSR))
