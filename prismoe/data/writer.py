"""Writing one shard: temporary names until every byte is on disk."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from prismoe.data.shards import Shard, SplitCounts
from prismoe.folder import FileEntry, fsync_folder
from prismoe.room import unwritten

__all__ = ["HashedFile", "ShardWriter"]


class ShardWriter:
    """Appends documents to `<name>.tokens` and `<name>.ends`; a context that leaves nothing behind unless finished.

    Its files appear with the first document: a shard of none is not written.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path, name: str, *, dtype: np.dtype[Any], unknown_token: int | None) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._unknown = -1 if unknown_token is None else unknown_token
        self._files: list[HashedFile] = []
        self.num_tokens = self.num_documents = self.num_bytes = self.num_unknown = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.discard()

    def add(
        self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], num_bytes: npt.NDArray[np.int64]
    ) -> None:
        """Append documents: all their ids [tokens], how many each has and its bytes of text [documents]."""
        if not len(lengths):
            return
        if not self._files:
            for part in ("tokens", "ends"):
                self._files.append(HashedFile(self._folder, f"{self._name}.{part}"))
        ends = np.cumsum(np.stack([lengths, num_bytes], axis=1), axis=0)
        ends += np.array([self.num_tokens, self.num_bytes])
        self._files[0].write(ids.astype(self._dtype))
        self._files[1].write(ends.astype("<i8"))
        self.num_tokens, self.num_bytes = (int(n) for n in ends[-1])
        self.num_documents += len(lengths)
        self.num_unknown += int(np.count_nonzero(ids == self._unknown))

    def finish(self) -> tuple[Shard, dict[str, FileEntry]] | None:
        """Make both files durable under their names: the shard and its manifest entries, None for one of nothing."""
        if not self._files:
            return None
        entries = {file.name: file.finish() for file in self._files}
        fsync_folder(self._folder)
        counts = SplitCounts(self.num_tokens, self.num_documents, self.num_bytes, self.num_unknown)
        return Shard(self._name, counts), entries


class HashedFile:
    """One file under a temporary name (one that `claim` clears away), hashed as it is written.

    A context that leaves nothing behind unless finished.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self._path = name, folder / name
        self._partial = folder / f".{name}.{os.getpid()}.partial"
        self._hash, self._size = hashlib.sha256(), 0
        try:
            self._file: BinaryIO = self._partial.open("wb")
        except OSError as error:
            raise unwritten(self._path, error) from error

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, array: npt.NDArray[Any]) -> None:
        """Append the bytes of a contiguous array."""
        try:
            self._file.write(array.data)
        except OSError as error:
            raise unwritten(self._path, error, size=self._size + array.nbytes) from error
        self._hash.update(array.data)
        self._size += array.nbytes

    def finish(self) -> FileEntry:
        """Give the file its name, durably; the manifest's entry."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.rename(self._path)
        except OSError as error:
            raise unwritten(self._path, error, size=self._size) from error
        return {"sha256": self._hash.hexdigest(), "bytes": self._size}

    def discard(self) -> None:
        """Close it, and remove what has no name yet."""
        with suppress(
            OSError
        ):  # a full disk also fails the last flush; the error that brought us here is the one to tell
            self._file.close()
        with suppress(OSError):  # of a disk that became read-only; `claim` clears it away another time
            self._partial.unlink(missing_ok=True)
