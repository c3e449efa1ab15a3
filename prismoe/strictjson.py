"""JSON that came from somewhere: an object, each key once, nothing beyond the standard, of bounded size."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from prismoe.errors import InputError

__all__ = ["MAX_BYTES", "parse_json", "read_json"]

# The largest index of a published model has 10 MB. Python's objects can be twenty times as large as their text, so
# that this is what keeps a file of brackets below 1 GiB.
MAX_BYTES = 32_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        InputError: as `parse_json`, or the file cannot be read.
    """
    path = Path(path)
    try:
        if not path.is_file():  # a pipe would be waited for
            raise InputError("not a file", where=str(path), needed="JSON")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise InputError(f"{size} bytes", where=str(path), needed=f"at most {MAX_BYTES} of JSON")
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=str(path)) from error
    return parse_json(data, where=str(path))


def parse_json(data: bytes, *, where: str) -> dict[str, Any]:
    """A JSON object; duplicate keys, numbers that are not finite, half of a surrogate pair and anything that is not an
    object are refused: what is returned can be written again.

    Raises:
        InputError: with what is wrong.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise InputError(f"key {twice!r} appears twice"[:120], where=where)
        return seen

    def no_constant(name: str) -> Any:
        raise InputError(f"{name} is not JSON", where=where)

    def finite(text: str) -> float:
        if math.isinf(number := float(text)):
            raise InputError(f"number {text}"[:60], where=where, needed="one that is finite")
        return number

    try:
        found = json.loads(data, object_pairs_hook=no_duplicates, parse_constant=no_constant, parse_float=finite)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(found, ensure_ascii=False).encode()
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=where) from error
    if not isinstance(found, dict):
        raise InputError(f"JSON {type(found).__name__}", where=where, needed="an object")
    return found
