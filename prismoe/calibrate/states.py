"""Scratch files of a calibration: hidden states that wait between windows of layers, and how far the work has come."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch

from prismoe.checkpoint.tensorfile import DTYPES, header_bytes, read_header
from prismoe.errors import InputError
from prismoe.folder import write_atomic
from prismoe.strictjson import parse_json

__all__ = ["States", "read_progress", "write_progress"]

Array = npt.NDArray[Any]
_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.float32): "F32",
}


class States:
    """[N, T, D] numbers in a file, written and read by ranges of sequences, in the precision of the computation.

    Raises:
        InputError: a file that was to be there (`made` earlier) is not, or is not whole.
    """

    def __init__(self, path: Path, *, shape: tuple[int, int, int], dtype: torch.dtype, made: bool) -> None:
        self.path, self.dtype = path, dtype
        stored = np.dtype(ml_dtypes.bfloat16) if dtype is torch.bfloat16 else np.dtype(np.float32)
        size = int(np.prod(shape)) * stored.itemsize
        if made and not (path.is_file() and path.stat().st_size == size):
            needed, hint = f"{size} bytes, as the stopped call left it", "start again with --force"
            raise InputError("scratch file is gone or cut", where=str(path), needed=needed, hint=hint)
        self._values = np.memmap(path, stored, mode="r+" if made else "w+", shape=shape)

    def write(self, first: int, values_BTD: torch.Tensor) -> None:
        """Put the states of sequences `first`, `first` + 1, …"""
        values = values_BTD.detach().to("cpu").contiguous()
        array = values.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if self.dtype is torch.bfloat16 else None
        self._values[first : first + len(values)] = values.numpy() if array is None else array

    def read(self, first: int, stop: int, *, device: torch.device) -> torch.Tensor:
        """[stop - first, T, D] on `device`; a private copy."""
        return self._tensor(np.array(self._values[first:stop]), device)

    def rows(self, numbers_S: npt.NDArray[np.int64], *, device: torch.device) -> torch.Tensor:
        """[S, D] of single tokens, number n·T + t each, on `device`."""
        return self._tensor(self._values.reshape(-1, self._values.shape[-1])[numbers_S], device)

    def _tensor(self, array: Array, device: torch.device) -> torch.Tensor:
        if self.dtype is torch.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).to(device)
        return torch.from_numpy(array).to(device)

    def flush(self) -> None:
        self._values.flush()

    def remove(self) -> None:
        """Delete the file."""
        del self._values
        self.path.unlink(missing_ok=True)


def write_progress(path: Path, *, step: Mapping[str, Any], arrays: Mapping[str, Array]) -> None:
    """Replace the record of how far the work has come."""
    entries = [(name, _NAMES[array.dtype], array.shape) for name, array in arrays.items()]
    data = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
    write_atomic(path, header_bytes(entries, metadata={"step": json.dumps(step)}) + data)


def read_progress(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """The record, or two empty ones when there is none.

    Raises:
        InputError: the file is damaged.
    """
    if not path.is_file():
        return {}, {}
    infos, metadata = read_header(path)
    data = path.read_bytes()
    arrays = {
        name: np.frombuffer(data, DTYPES[info.dtype], count=int(np.prod(info.shape)), offset=info.start)
        .reshape(info.shape)
        .copy()
        for name, info in infos.items()
    }
    if "step" not in metadata:
        raise InputError("no step", where=str(path), hint="calibrate again with --force")
    return parse_json(metadata["step"].encode(), where=str(path)), arrays
