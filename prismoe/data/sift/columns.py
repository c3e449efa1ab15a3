"""What sift knows of the documents of one file: flat little-endian arrays, one entry a document, one file a column.

`number` is written under its name last: a file whose numbers are there has all of its columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from prismoe.data.sift.duplicates import BANDS
from prismoe.errors import InputError
from prismoe.folder import fsync_folder
from prismoe.room import unwritten

__all__ = ["COLUMNS", "ColumnWriter", "complete", "read"]

COLUMNS = {"number": "<i8", "size": "<u4", "benchmark": "<u2", "hash": "<u8", "bands": f"({BANDS},)<u8", "why": "<u1"}
"""`number` of the document in its file, `size` of its text in bytes, `benchmark` 1 + that of the file it has words in
common with; fingerprints; `why` it is dropped, 0 kept. A filter's column is `score-<its place>`, float64."""


def _dtype(column: str) -> np.dtype[Any]:
    return np.dtype(COLUMNS.get(column, "<f8"))


class ColumnWriter:
    """Appends to the columns of the file known as `stem`; a context that leaves nothing behind unless finished.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path, stem: str, columns: list[str]) -> None:
        self._folder, self._stem = folder, stem
        self._columns = sorted(columns, key=lambda column: column == "number")
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> ColumnWriter:
        try:
            for column in self._columns:
                self._files[column] = self._partial(column).open("wb")
        except OSError as error:
            raise unwritten(self._folder, error) from error
        return self

    def _partial(self, column: str) -> Path:
        return self._folder / f".{self._stem}.{column}.{os.getpid()}.partial"

    def add(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Append some documents: an array for every column."""
        try:
            for column in self._columns:
                self._files[column].write(np.ascontiguousarray(arrays[column], _dtype(column).base).tobytes())
        except OSError as error:
            raise unwritten(self._folder, error) from error

    def finish(self) -> None:
        """Make every column durable under its name."""
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
            for column in self._columns:
                self._partial(column).rename(self._folder / f"{self._stem}.{column}")
        except OSError as error:
            raise unwritten(self._folder, error) from error
        fsync_folder(self._folder)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for column, file in self._files.items():
            with suppress(OSError):  # the error that brought us here is the one to tell
                file.close()
            self._partial(column).unlink(missing_ok=True)


def complete(folder: Path, stem: str) -> bool:
    """Whether all columns of a file are there."""
    return (folder / f"{stem}.number").is_file()


def read(folder: Path, stem: str, column: str) -> npt.NDArray[Any]:
    """One column, memory-mapped.

    Raises:
        InputError: it is missing or has been cut.
    """
    path, dtype = folder / f"{stem}.{column}", _dtype(column)
    if not path.is_file() or path.stat().st_size % dtype.itemsize:
        raise InputError("missing or damaged", where=str(path), hint="prismoe sift --force makes all anew")
    if not path.stat().st_size:
        return np.zeros((0, *dtype.shape), dtype.base)
    return np.memmap(path, dtype.base, mode="r").reshape(-1, *dtype.shape)
