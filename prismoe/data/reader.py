"""Documents out of text files: `.jsonl`, `.jsonl.zst`, `.jsonl.gz` (one JSON object a line) and `.txt` (one document).

Files stream through in small blocks: memory holds one line, whatever the size of the file.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zstandard

from prismoe.errors import InputError

__all__ = ["SUFFIXES", "Document", "read_documents"]

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz", ".txt")
AUTO_FIELDS = ("content", "text")
# A tokenizer needs some 50 bytes per character of one document, so a longer one would exhaust memory later.
MAX_DOCUMENT = 64 << 20
# Text compresses 3 to 20 times; what expands further than this after the first block is a bomb, not text.
MAX_RATIO, RATIO_FREE = 200, 64 << 20
_READ = 1 << 16
# One compressed block can hold 128 KiB in 4 bytes: small bites bound what a single call can give.
_READ_ZSTD = 1 << 12


@dataclass(frozen=True)
class Document:
    """One document: `num_bytes` of UTF-8, `where` is file:line, `position` bytes of the file read by then."""

    text: str
    num_bytes: int
    where: str
    position: int


def read_documents(path: Path, *, field: str = "auto") -> Iterator[Document]:
    """Every document of `path`, in order; empty ones too. Blank lines are skipped, a byte order mark is dropped.

    Args:
        path: a file with one of `SUFFIXES`.
        field: the key of the text in each JSON object; `auto` takes `content`, else `text`.

    Raises:
        InputError: not readable, damaged, not UTF-8, invalid JSON, a missing field, a document over 64 MiB, a file that
            expands more than 200-fold, or a file without documents. The message names file and line.
    """
    documents = _text_file(path) if path.suffix == ".txt" else _json_lines(path, field)
    found = False
    for document in documents:
        found = True
        yield document
    if not found:
        raise InputError("no documents in it", where=str(path))


def _text_file(path: Path) -> Iterator[Document]:
    data = bytearray()
    for block, _ in _blocks(path):
        data += block
        _check_length(len(data), str(path))
    text = _decode(bytes(data), str(path)).removeprefix("\ufeff")
    if text:
        yield Document(text=text, num_bytes=len(text.encode()), where=str(path), position=len(data))


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    for number, (line, position) in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        text = _decode(line, where)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        content = _content(text, field, where)
        try:
            num_bytes = len(content.encode())
        except UnicodeEncodeError as error:
            raise InputError("half of a surrogate pair, which is no character", where=where) from error
        yield Document(text=content, num_bytes=num_bytes, where=where, position=position)


def _content(line: str, field: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"invalid JSON ({error.msg} at column {error.colno})", where=where) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"JSON that cannot be read ({type(error).__name__})", where=where) from error
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}", where=where, needed="one JSON object a line")
    if field == "auto":
        field = next((name for name in AUTO_FIELDS if name in row), " or ".join(AUTO_FIELDS))
    if field not in row:
        keys = ", ".join(sorted(row)[:8]) or "none"
        raise InputError(f"no field {field} (fields: {keys})", where=where, hint="name the field that holds the text")
    if not isinstance(row[field], str):
        raise InputError(f"field {field} is a {type(row[field]).__name__}", where=where, needed="a string")
    content: str = row[field]
    return content


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    parts: list[bytes] = []
    length = number = position = 0
    for block, position in _blocks(path):
        *whole, rest = block.split(b"\n")
        for end in whole:
            number += 1
            _check_length(length + len(end), f"{path}:{number}")
            yield b"".join([*parts, end]), position
            parts, length = [], 0
        if rest:
            parts.append(rest)
            length += len(rest)
            _check_length(length, f"{path}:{number + 1}")
    if parts:
        yield b"".join(parts), position


def _check_length(length: int, where: str) -> None:
    if length > MAX_DOCUMENT:
        raise InputError(
            f"a document over {MAX_DOCUMENT >> 20} MiB", where=where, hint="cut it into parts, for instance chapters"
        )


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start})",
            where=where,
            hint="convert with iconv",
        ) from error


class _Decompressor(Protocol):
    """What zlib's and zstandard's objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes) -> bytes: ...


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """(text bytes, compressed bytes read so far) of a file, decompressed by its suffix."""
    makers: dict[str, Callable[[], Any]] = {
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(),
        ".gz": lambda: zlib.decompressobj(wbits=31),
    }
    try:
        if path.suffix in makers:
            yield from _decompressed(path, makers[path.suffix])
            return
        position = 0
        with path.open("rb") as file:
            while block := file.read(_READ):
                position += len(block)
                yield block, position
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"damaged compressed file ({error})", where=str(path)) from error


def _decompressed(path: Path, make: Callable[[], _Decompressor]) -> Iterator[tuple[bytes, int]]:
    position = produced = 0
    current: _Decompressor | None = None
    with path.open("rb") as file:
        while data := file.read(_READ_ZSTD):
            position += len(data)
            while data:
                current = current or make()
                block = current.decompress(data)
                data = current.unused_data if current.eof else b""
                current = None if current.eof else current
                produced += len(block)
                if produced > max(RATIO_FREE, MAX_RATIO * position):
                    raise InputError(
                        f"expands more than {MAX_RATIO}-fold",
                        where=str(path),
                        hint="decompress it yourself if it is text",
                    )
                yield block, position
    if current is not None:
        raise InputError("compressed file ends in the middle", where=str(path), hint="copy or download it again")
