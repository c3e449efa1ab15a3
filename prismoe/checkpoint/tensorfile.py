"""The safetensors container: a strict header reader (the file may be damaged or hostile) and a header writer.

Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.strictjson import MAX_BYTES, parse_json

__all__ = ["DTYPES", "TensorInfo", "header_bytes", "read_header", "read_sealed", "sealed_bytes", "tensor_bytes"]

DTYPES: dict[str, npt.DTypeLike] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
"""safetensors dtype name → NumPy dtype."""

ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor on disk: safetensors dtype name, shape, and the bytes [start, start + nbytes) of `file`."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return ITEM_BYTES[dtype] * math.prod(shape)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors (in file order) and free metadata of a safetensors file. Reads the header only.

    Every promise of the format is checked: known dtypes, sizes equal to the product of the shape, data that is
    contiguous, does not overlap and ends exactly where the file ends.

    Raises:
        InputError: naming the file and, where there is one, the tensor.
    """
    where = str(path)
    try:
        with path.open("rb") as file:
            prefix, size = file.read(8), path.stat().st_size
            if len(prefix) < 8:
                raise InputError(f"{size} bytes", where=where, needed="a safetensors file")
            length: int = struct.unpack("<Q", prefix)[0]
            if length > MAX_BYTES or 8 + length > size:
                raise InputError(
                    f"header of {length} bytes in a file of {size}",
                    where=where,
                    needed="a whole safetensors file",
                    hint="the file is truncated or not safetensors",
                )
            raw = parse_json(file.read(length), where=where)
    except OSError as error:
        raise InputError(f"cannot read: {error.strerror}", where=where) from error
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("__metadata__ is not a map of strings", where=where)
    base = 8 + length
    tensors = [(name, _entry(name, entry, path, base)) for name, entry in raw.items()]
    tensors.sort(key=lambda pair: (pair[1].start, pair[1].nbytes))
    end = base
    for name, info in tensors:
        if info.start != end:
            wrong = "overlaps another tensor" if info.start < end else "leaves a gap before it"
            raise InputError(f"data {wrong}", where=f"{where}: {name}")
        end = info.start + info.nbytes
    if end != size:
        raise InputError(
            f"{size} bytes", where=where, needed=f"{end} for its tensors", hint="the file is truncated or has a tail"
        )
    return dict(tensors), metadata


def _entry(name: str, entry: object, path: Path, base: int) -> TensorInfo:
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise InputError("header entry is damaged", where=where, needed="dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}", where=where, needed=f"one of {', '.join(DTYPES)}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise InputError("shape or data_offsets are not whole numbers ≥ 0", where=where)
    start, end = offsets
    needed = tensor_bytes(dtype, tuple(shape))
    if end - start != needed:
        raise InputError(f"{end - start} bytes", where=where, needed=f"{needed} for {dtype} {shape}")
    return TensorInfo(dtype=dtype, shape=tuple(shape), file=path, start=base + start, nbytes=needed)


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def header_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str], align: int = 8
) -> bytes:
    """The first bytes of a safetensors file whose data holds `tensors` (name, dtype, shape) in the order given.

    The header is padded with spaces to a multiple of `align` bytes, so that the data starts aligned.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in tensors:
        size = tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % align)
    return struct.pack("<Q", len(text)) + text


SEAL = "sha256"


def sealed_bytes(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], data: bytes, *, metadata: Mapping[str, str]
) -> bytes:
    """A whole file that carries the sha256 of everything else in it, for files that no manifest lists."""
    entries = list(tensors)
    seal = hashlib.sha256(header_bytes(entries, metadata=metadata) + data).hexdigest()
    return header_bytes(entries, metadata={**metadata, SEAL: seal}) + data


def read_sealed(path: Path, *, keys: set[str]) -> tuple[dict[str, TensorInfo], dict[str, str], bytes]:
    """`read_header` and the bytes of a whole file; the metadata has `keys`, and a seal unless it was written before.

    Raises:
        InputError: damaged: it is not what `sealed_bytes` wrote.
    """
    infos, metadata = read_header(path)
    data = path.read_bytes()
    seal = metadata.pop(SEAL, None)
    if seal is not None or metadata.keys() - keys:
        entries = [(name, info.dtype, info.shape) for name, info in infos.items()]
        start = 8 + struct.unpack("<Q", data[:8])[0]
        if metadata.keys() - keys or sealed_bytes(entries, data[start:], metadata=metadata) != data:
            raise InputError("was changed after it was written", where=str(path), hint="make it again")
    return infos, metadata, data
