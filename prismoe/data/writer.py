"""Writing one split of a domain: temporary names until every byte is on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from prismoe.data.shards import Split, SplitCounts, token_dtype
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import ResourceError
from prismoe.folder import FileEntry, fsync_folder

__all__ = ["SplitWriter"]


class SplitWriter:
    """Appends documents to `<split>.tokens` and `<split>.ends`; a context that leaves nothing behind unless finished.

    Raises:
        ResourceError: the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path, split: Split, *, encoder: DocumentTokenizer) -> None:
        self._folder, self._split = folder, split
        self._dtype = token_dtype(encoder.vocab_size)
        self._unknown = -1 if encoder.unknown_token is None else encoder.unknown_token
        self._files = [_File(folder, f"{split}.{part}") for part in ("tokens", "ends")]
        self.num_tokens = self.num_documents = self.num_bytes = self.num_unknown = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.discard()

    def add(self, documents: Iterable[tuple[npt.NDArray[np.int64], int]]) -> None:
        """Append (ids, bytes of text) of each document."""
        documents = list(documents)
        if not documents:
            return
        ids = np.concatenate([ids for ids, _ in documents])
        lengths = np.array([(len(ids), num_bytes) for ids, num_bytes in documents], np.int64)
        ends = np.cumsum(lengths, axis=0) + np.array([self.num_tokens, self.num_bytes])
        self._files[0].write(ids.astype(self._dtype))
        self._files[1].write(ends.astype("<i8"))
        self.num_tokens, self.num_bytes = (int(n) for n in ends[-1])
        self.num_documents += len(documents)
        self.num_unknown += int(np.count_nonzero(ids == self._unknown))

    def finish(self) -> tuple[SplitCounts, dict[str, FileEntry]]:
        """Make both files durable under their names; return what they hold and their manifest entries."""
        entries = {file.name: file.finish() for file in self._files}
        fsync_folder(self._folder)
        return SplitCounts(self.num_tokens, self.num_documents, self.num_bytes, self.num_unknown), entries


class _File:
    """One file under a temporary name (one that `claim` clears away), hashed as it is written."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self._path = name, folder / name
        self._partial = folder / f".{name}.{os.getpid()}.partial"
        self._hash, self._size = hashlib.sha256(), 0
        try:
            self._file: BinaryIO = self._partial.open("wb")
        except OSError as error:
            raise ResourceError(f"cannot write: {error.strerror}", where=str(self._path)) from error

    def write(self, array: npt.NDArray[Any]) -> None:
        try:
            self._file.write(array.data)
        except OSError as error:
            raise ResourceError(
                f"cannot write: {error.strerror}", where=str(self._path), hint="free some space and run it again"
            ) from error
        self._hash.update(array.data)
        self._size += array.nbytes

    def finish(self) -> FileEntry:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.rename(self._path)
        except OSError as error:
            raise ResourceError(f"cannot write: {error.strerror}", where=str(self._path)) from error
        return {"sha256": self._hash.hexdigest(), "bytes": self._size}

    def discard(self) -> None:
        with suppress(
            OSError
        ):  # a full disk also fails the last flush; the error that brought us here is the one to tell
            self._file.close()
        self._partial.unlink(missing_ok=True)
