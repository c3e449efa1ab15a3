"""Damage, drawn from a seed: bits and lengths of any file, and the structure of JSON wherever it stands."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

__all__ = ["Raw", "broken_bytes", "broken_json", "broken_sealed", "flipped", "text_of"]


class Raw(str):
    """Text that stands in JSON as it is: what `json.dumps` would never write."""

    __slots__ = ()


NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63),
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "\0",
        "\ud800",
        "../../x",
    ),
    *(
        "/etc/passwd",
        "a" * 5000,
        [],
        {},
        [[]],
        [None],
        {"": {}},
        [0] * 3000,
        Raw("NaN"),
        Raw("-Infinity"),
        Raw("1e999"),
    ),
    *(Raw("[" * 3000 + "]" * 3000), Raw('{"a":' * 3000 + "1" + "}" * 3000), Raw("9" * 5000), Raw("-"), Raw("")),
)


def _nasty(draw: random.Random) -> Any:
    return copy.deepcopy(draw.choice(NASTY))


def text_of(value: Any) -> str:
    """JSON of a value that may hold `Raw` text, also as a whole key and value (`Raw('"a": 1')`: None)."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        items = (str(k) if isinstance(k, Raw) else f"{json.dumps(k)}: {text_of(v)}" for k, v in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(text_of, value)) + "]"
    return json.dumps(value)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below `value`."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found = [(value, key) for key in keys]
    for key in keys:
        found += _places(value[key])
    return found


def broken_json(value: Any, draw: random.Random) -> bytes:
    """`value` with one to three places changed in type, size, name, number or depth."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if not (places := _places(value)):
            break
        container, key = draw.choice(places)
        if isinstance(container, dict) and isinstance(key, Raw):
            continue
        kind = draw.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[Raw(f"{json.dumps(key)}: {text_of(_nasty(draw))}")] = None  # a second time
        elif kind == 2 and isinstance(container, dict):
            container[draw.choice(("", "x", key + " ", "__class__", "../" + key))] = container.pop(key)
        elif kind == 3:
            other, name = draw.choice(places)
            if not isinstance(name, Raw) and (name in other if isinstance(other, dict) else name < len(other)):
                container[key] = copy.deepcopy(other[name])
        elif kind == 4 and isinstance(container[key], int | float):
            number = container[key]
            container[key] = draw.choice((number + 1, number - 1, -number, number * 2**20, float(number), str(number)))
        elif kind == 5 and isinstance(container[key], list) and container[key]:
            container[key] = container[key] * draw.choice((0, 2, 100))
        else:
            container[key] = _nasty(draw)
    text = text_of(value).encode("utf-8", "surrogatepass")
    return broken_bytes(text, draw) if draw.random() < 0.1 else text


def flipped(data: bytes, bit: int) -> bytes:
    """One bit the other way."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def broken_bytes(data: bytes, draw: random.Random) -> bytes:
    """Some bits flipped, a piece cut out, doubled or overwritten, or the end cut off."""
    if not data:
        return b"\xff"
    kind, at, length = draw.randrange(6), draw.randrange(len(data)), draw.choice((1, 2, 8, 64, 1000))
    if kind == 0:
        return flipped(data, 8 * at + draw.randrange(8))
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * 2 + data[at + length :]
    if kind == 4:
        return data[:at] + draw.randbytes(length) + data[at + length :]
    return data + draw.choice((b"\0", b"\n", b"}", b" " * 1000, data[:100]))


def broken_sealed(data: bytes, draw: random.Random, *, inner: str = "") -> bytes:
    """A safetensors file with a broken header, or broken JSON in key `inner` of its metadata; its seal is left out."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = draw.random()
    if kind < 0.15:
        return broken_bytes(data, draw)
    if "__metadata__" in header:
        header["__metadata__"].pop("sha256", None)
    if inner and kind < 0.7:
        header["__metadata__"][inner] = broken_json(json.loads(header["__metadata__"][inner]), draw).decode(
            "utf-8", "replace"
        )
        text = json.dumps(header).encode()
    else:
        text = broken_json(header, draw)
    size = draw.choice((0, 1, len(text) - 1, 2**40, 2**63)) if kind > 0.97 else len(text)
    return struct.pack("<Q", max(size, 0)) + text + rest
