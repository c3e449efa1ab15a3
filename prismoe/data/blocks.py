"""Lines of text files, plain or compressed, in bounded memory: a hostile file costs an error, never the machine."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import zstandard

from prismoe.errors import InputError

__all__ = ["MAX_DOCUMENT", "read_blocks", "read_lines"]

# A tokenizer needs some 50 bytes per character of one document, so a longer one would exhaust memory later.
MAX_DOCUMENT = 64 << 20
# Text compresses 3 to 20 times; what expands further than this after the first block is a bomb, not text.
MAX_RATIO, RATIO_FREE = 200, 64 << 20
_READ = 1 << 16
# One compressed block can hold 128 KiB in 4 bytes: small bites bound what a single call can give.
_READ_COMPRESSED = 1 << 12


def read_lines(path: Path) -> Iterator[tuple[bytes | None, int]]:
    """(line without its newline, bytes of the file read so far); None in place of a line over `MAX_DOCUMENT`.

    Raises:
        InputError: see `read_blocks`.
    """
    parts: list[bytes] = []
    length = position = 0
    for block, position in read_blocks(path):
        *whole, rest = block.split(b"\n")
        for end in whole:
            length += len(end)
            if length > MAX_DOCUMENT:
                yield None, position
            else:
                yield (b"".join((*parts, end)) if parts else end), position
            parts, length = [], 0
        if rest:
            length += len(rest)
            if length > MAX_DOCUMENT:
                parts = []  # the rest of a line that is too long is read past, not kept
            else:
                parts.append(rest)
    if length:
        yield (None if length > MAX_DOCUMENT else b"".join(parts)), position


class _Decompressor(Protocol):
    """What zlib's and zstandard's objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes) -> bytes: ...


def read_blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """(text bytes, compressed bytes read so far) of a file, decompressed by its suffix.

    Raises:
        InputError: not readable, damaged, cut off, or it expands more than 200-fold; with the offset where that shows.
    """
    makers: dict[str, Callable[[], Any]] = {
        ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 27).decompressobj(),
        ".gz": lambda: zlib.decompressobj(wbits=31),
    }
    position = 0
    try:
        with path.open("rb") as file:
            if path.suffix not in makers:
                while block := file.read(_READ):
                    position += len(block)
                    yield block, position
                return
            make, produced = makers[path.suffix], 0
            current: _Decompressor | None = None
            while data := file.read(_READ_COMPRESSED):
                position += len(data)
                while data:
                    current = current or make()
                    block = current.decompress(data)
                    data = current.unused_data if current.eof else b""
                    current = None if current.eof else current
                    produced += len(block)
                    _check_ratio(path, position, produced)
                    yield block, position
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"damaged compressed file near offset {position} ({error})", where=str(path)) from error
    if current is not None:
        raise InputError(
            f"compressed file ends in the middle, at offset {position}",
            where=str(path),
            hint="copy or download it again",
        )


def _check_ratio(path: Path, position: int, produced: int) -> None:
    if produced > max(RATIO_FREE, MAX_RATIO * position):
        raise InputError(
            f"expands more than {MAX_RATIO}-fold by offset {position}",
            where=str(path),
            hint="decompress it yourself if it is text",
        )
