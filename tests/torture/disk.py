"""Every step of a process that changes the disk, counted. The N-th can be the last, what was not synced can be lost.

Installed in a forked process (`processes.py`) before the command runs. A step is a write, rename, sync, truncation,
removal or new folder below `folder`; threads and forked workers count in one order. At step N either half of a write
is done or the step is not, and the whole process group is killed with SIGKILL. Instead of that a step can fail, or
meet a disk that is full by then (`scarce.py`).

With a `journal`, what an fsync made durable is kept there: a file's bytes by its inode, a folder's names. `lose` then
puts a folder into the state that a machine without power would find: only what was synced, names included.
"""

# The functions of `os` are what is watched here.
# ruff: noqa: PTH109, PTH110, PTH115, PTH116, PTH118

from __future__ import annotations

import builtins
import io
import json
import mmap
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Counter", "Journal", "Meet", "install"]

Meet = Callable[[int, str, str], None]
"""Told the number, the name and the file of every step, and of every file made (no step of its own); may raise."""


class Counter:
    """A number that forked processes share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)
        self._lock = threading.Lock()

    def add(self) -> int:
        with self._lock:
            value = self.value + 1
            self._memory[:8] = value.to_bytes(8, "little")
            return value

    @property
    def value(self) -> int:
        return int.from_bytes(self._memory[:8], "little")


class Journal:
    """What is durable of `folder`, kept in `place`: bytes by inode, names by folder."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        folder.mkdir(parents=True, exist_ok=True)
        for path in [folder, *folder.rglob("*")]:
            self.synced(path)

    def _of(self, path: Path | int) -> Path:
        return self.place / str(os.stat(path, follow_symlinks=isinstance(path, int)).st_ino)

    def synced(self, path: Path) -> None:
        """`path` was synced: its bytes, or the names in it, are durable now."""
        if path.is_dir():
            names = {entry.name: [entry.inode(), entry.is_dir(follow_symlinks=False)] for entry in os.scandir(path)}
            self._of(path).write_text(json.dumps(names))
        elif path.is_file():
            shutil.copyfile(path, self._of(path))

    def forget(self, handle: int) -> None:
        """A file was made: nothing of it is durable yet (its inode may have been another's)."""
        self._of(handle).unlink(missing_ok=True)

    def lose(self) -> None:
        """Put the folder into the durable state. A name whose file was never synced is an empty file."""
        root = self._of(self.folder)
        for path in list(self.folder.iterdir()):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._restore(self.folder, root)

    def _restore(self, folder: Path, names: Path) -> None:
        folder.mkdir(exist_ok=True)
        if not names.is_file():
            return
        for name, (inode, is_folder) in json.loads(names.read_text()).items():
            kept = self.place / str(inode)
            if is_folder:
                self._restore(folder / name, kept)
            elif kept.is_file():
                shutil.copyfile(kept, folder / name)
            else:
                (folder / name).touch()


def install(
    folder: Path, counter: Counter, *, at: int = 0, journal: Journal | None = None, meet: Meet | None = None
) -> None:
    """Watch this process from now on. `at` is the step to die at, 0 to count only. For a process that ends soon."""
    below = str(folder.resolve()) + os.sep

    def named_by(target: Any, directory: int | None = None) -> str:
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        start = os.readlink(f"/proc/self/fd/{directory}") if directory is not None else os.getcwd()
        return os.path.join(start, os.fsdecode(target))

    def ours(target: Any, directory: int | None = None) -> bool:
        return (named_by(target, directory) + os.sep).startswith(below)

    def step(name: str, path: str, half: Callable[[], Any] | None = None) -> None:
        number = counter.add()
        if meet is not None:
            meet(number, name, path)
        if number == at:
            if half is not None:
                half()
            os.killpg(os.getpgid(0), signal.SIGKILL)
            signal.pause()

    def watch(name: str, *, half: bool = False, after: Callable[..., None] | None = None) -> None:
        real = getattr(os, name)

        def watched(*args: Any, **named: Any) -> Any:
            if ours(args[0], named.get("dir_fd")):
                path = named_by(args[0], named.get("dir_fd"))
                step(name, path, (lambda: real(args[0], args[1][: len(args[1]) // 2], *args[2:])) if half else None)
                result = real(*args, **named)
                if after is not None:
                    after(*args)
                return result
            return real(*args, **named)

        setattr(os, name, watched)

    def synced(target: int) -> None:
        if journal is not None:
            journal.synced(Path(os.readlink(f"/proc/self/fd/{target}")))

    for name in ("write", "pwrite"):
        watch(name, half=True)
    for name in ("fsync", "fdatasync"):
        watch(name, after=synced)
    for name in ("rename", "replace", "ftruncate", "truncate", "posix_fallocate", "unlink", "remove", "rmdir", "mkdir"):
        watch(name)

    class Watched(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            step("write", named_by(self.fileno()), lambda: io.FileIO.write(self, view[: len(view) // 2]))
            return super().write(data)

    real_open, real_os_open = io.open, os.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
        writes = any(letter in mode for letter in "wax+")
        if not writes or isinstance(file, int) or named.get("opener") or not ours(file):
            return real_open(file, mode, buffering, *args, **named)
        fresh = not os.path.exists(file)
        if meet is not None:
            meet(counter.value, "create" if fresh else "open", named_by(file))
        raw = Watched(file, mode.replace("b", "").replace("t", ""))
        if fresh and journal is not None:
            journal.forget(raw.fileno())
        if buffering == 0:
            return raw
        both = "+" in mode
        buffer = io.BufferedRandom(raw) if both else io.BufferedWriter(raw)
        return buffer if "b" in mode else io.TextIOWrapper(buffer, *args, **named)

    def opened_low(path: Any, flags: int, *args: Any, **named: Any) -> int:
        fresh = flags & os.O_CREAT and not os.path.exists(path)
        if meet is not None and flags & (os.O_WRONLY | os.O_RDWR) and ours(path, named.get("dir_fd")):
            meet(counter.value, "create" if fresh else "open", named_by(path, named.get("dir_fd")))
        handle = real_os_open(path, flags, *args, **named)
        if fresh and journal is not None and ours(handle):
            journal.forget(handle)
        return handle

    io.open = builtins.open = opened  # type: ignore[assignment]
    os.open = opened_low
