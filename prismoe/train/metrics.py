"""The log of a run: one JSON object a line, and no clock in it, so that a resumed run writes the same bytes."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from prismoe.errors import InputError
from prismoe.room import unwritten

__all__ = ["MetricsLog", "read_metrics"]


class MetricsLog:
    """Append-only `metrics.jsonl`. `position` is its length in bytes: what a training checkpoint remembers."""

    def __init__(self, path: Path, *, position: int, muted: bool = False) -> None:
        """Open `path` and cut it to `position`: lines behind the checkpoint will be written again.

        A `muted` log, that of every process but one, writes nothing.

        Raises:
            InputError: the log is shorter than the checkpoint says.
            ResourceError: it cannot be written.
        """
        self._path = path
        try:
            self._file = (Path(os.devnull) if muted else path).open("ab")
        except OSError as error:
            raise unwritten(path, error) from error
        if muted:
            return
        found = self._file.seek(0, os.SEEK_END)
        if found < position:
            self._file.close()
            raise InputError(
                f"{found} bytes", where=str(path), needed=f"at least {position}", hint="start anew: --force"
            )
        self._file.truncate(position)
        self._file.seek(position)

    @property
    def position(self) -> int:
        return self._file.tell() if self._file.seekable() else 0

    def write(self, line: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            ResourceError: the disk is full or fails.
        """
        data = (json.dumps(line, allow_nan=False) + "\n").encode()
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise unwritten(self._path, error, size=len(data)) from error

    def sync(self) -> None:
        """Make all lines durable, so that a checkpoint never remembers more than the disk holds."""
        if self._file.name == os.devnull:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritten(self._path, error) from error

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed: one that could not be was told then
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a torn last line (the run is being written) is left out."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
