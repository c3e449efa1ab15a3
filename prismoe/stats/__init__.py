"""What calibration learned of one layer: `NeuronStats`, one .safetensors file. No torch here, nor in who reads it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from prismoe.checkpoint.tensorfile import DTYPES, header_bytes, read_header
from prismoe.errors import InputError, UsageError
from prismoe.folder import write_atomic
from prismoe.strictjson import parse_json

__all__ = ["QUANTITIES", "TENSORS", "NeuronStats", "check_stats"]

FORMAT = "prismoe-stats-1"
Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]

TENSORS: dict[str, tuple[str, str]] = {
    "mean": ("F32", "F"),
    "mean_abs": ("F32", "F"),
    "mean_square": ("F32", "F"),
    "cluster_tokens": ("I64", "C"),
    "importance": ("F32", "CF"),
    "rate": ("F32", "F"),
    "marks": ("I32", "SK"),
    "coactivation": ("I32", "FF"),
    "inputs": ("F32", "SD"),
    "scores": ("BF16", "SF"),
    "sample_clusters": ("I32", "S"),
}
"""Every tensor of a file: dtype and shape letters (C data clusters, F neurons, S sampled tokens, K marks a token)."""

QUANTITIES: dict[str, tuple[str, ...]] = {
    "activation": ("mean", "mean_abs", "mean_square"),
    "importance": ("importance",),
    "marks": ("rate", "marks"),
    "coactivation": ("coactivation",),
    "inputs": ("inputs",),
    "scores": ("scores",),
    "output": ("output_norm", "output_rms"),
}
"""What `calibrate` can be asked for, and the fields of `NeuronStats` each gives."""


@dataclass(frozen=True, eq=False)
class NeuronStats:
    """One layer. A neuron's activation is h = act(gate)·up, the input of down_proj; None is what was not asked for.

    mean, mean_abs, mean_square [F]: means of h, |h|, h² over all tokens.
    cluster_tokens [C]: tokens of each data cluster that have a next token to predict (T-1 of a sequence of T).
    importance [C, F]: Σ κ(h·∂ℒ/∂h) over the tokens of a data cluster / cluster_tokens (see `calibrate`).
    rate [F]: share of tokens that mark the neuron: it is among the K_a largest |h| of its token.
    marks [S, K_a]: the neurons that each sampled token marks, ascending.
    coactivation [F, F]: tokens that mark both neurons; the diagonal is how often one is marked.
    inputs [S, D]: what the FFN got at the sampled tokens. sample_clusters [S]: their data clusters.
    scores [S, F] bfloat16: |h·∂ℒ/∂h| at the sampled tokens, so that importance can be summed over other labels.
    output_norm, output_rms: mean and root mean square of ‖FFN(x)‖₂ over all tokens.

    Sampled tokens are drawn uniformly, without replacement, and are the same in every layer.
    """

    layer: int
    num_neurons: int
    hidden_size: int
    num_tokens: int
    mean: FloatArray | None = None
    mean_abs: FloatArray | None = None
    mean_square: FloatArray | None = None
    cluster_tokens: npt.NDArray[np.int64] | None = None
    importance: FloatArray | None = None
    rate: FloatArray | None = None
    marks: npt.NDArray[np.int32] | None = None
    coactivation: npt.NDArray[np.int32] | None = None
    inputs: FloatArray | None = None
    scores: Array | None = None
    sample_clusters: npt.NDArray[np.int32] | None = None
    output_norm: float | None = None
    output_rms: float | None = None

    def need(self, name: str) -> Any:
        """The field `name`, which must be there.

        Raises:
            UsageError: calibration was not asked for it; says how to.
        """
        value = getattr(self, name)
        if value is None:
            quantity = next((q for q, fields in QUANTITIES.items() if name in fields), "importance")
            raise UsageError(
                f"calibration has no {name}",
                where=f"layer {self.layer}",
                needed=f"quantity {quantity}",
                hint=f"run calibrate with {quantity} among its quantities",
            )
        return value

    def save(self, path: str | Path) -> Path:
        """Write one .safetensors file, scalars readable in its header. Equal statistics give equal bytes.

        Raises:
            InputError: the statistics are not what this class promises.
        """
        path = Path(path)
        check_stats(self, where=f"layer {self.layer}")
        tensors = {
            name: (dtype, np.ascontiguousarray(value, np.dtype(DTYPES[dtype]).newbyteorder("<")))
            for name, (dtype, _) in TENSORS.items()
            if (value := getattr(self, name)) is not None
        }
        scalars = {
            name: getattr(self, name)
            for name in ("layer", "num_neurons", "hidden_size", "num_tokens", "output_norm", "output_rms")
        }
        header = {"format": FORMAT, "scalars": json.dumps(scalars, sort_keys=True)}
        entries = [(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
        data = b"".join(array.tobytes() for _, array in tensors.values())
        write_atomic(path, header_bytes(entries, metadata=header) + data)
        return path

    @classmethod
    def load(cls, path: str | Path) -> NeuronStats:
        """Read a file (memory-mapped) and check every number in it.

        Raises:
            InputError: not such a file, damaged, or inconsistent; names the file and the tensor.
        """
        path = Path(path)
        where = str(path)
        infos, header = read_header(path)
        if header.get("format") != FORMAT:
            raise InputError(f"format {header.get('format')!r}", where=where, needed=f"neuron statistics ({FORMAT})")
        scalars = parse_json(header.get("scalars", "").encode(), where=where)
        expected = {"layer", "num_neurons", "hidden_size", "num_tokens", "output_norm", "output_rms"}
        if scalars.keys() != expected:
            raise InputError("header is damaged", where=where, needed="scalars " + ", ".join(sorted(expected)))
        found: dict[str, Any] = {}
        for name, info in infos.items():
            if name not in TENSORS:
                raise InputError(f"unexpected tensor {name!r}"[:80], where=where)
            dtype = TENSORS[name][0]
            if info.dtype != dtype:
                raise InputError(f"dtype {info.dtype}", where=f"{where}: {name}", needed=dtype)
            empty = not math.prod(info.shape)  # mmap refuses to map nothing; the check below refuses it by name
            found[name] = (
                np.empty(info.shape, DTYPES[dtype])
                if empty
                else np.memmap(path, np.dtype(DTYPES[dtype]), mode="r", offset=info.start, shape=info.shape)
            )
        stats = cls(**scalars, **found)
        check_stats(stats, where=where)
        return stats


def check_stats(stats: NeuronStats, *, where: str) -> None:
    """Everything that `NeuronStats` promises.

    Raises:
        InputError: naming the field.
    """
    sizes: dict[str, int] = {}
    for name in ("num_neurons", "hidden_size", "num_tokens"):
        value = getattr(stats, name)
        if type(value) is not int or not 0 < value < 2**53:
            raise InputError(f"{value!r}"[:80], where=f"{where}: {name}", needed="a count")
    if type(stats.layer) is not int or stats.layer < 0:
        raise InputError(f"{stats.layer!r}"[:80], where=f"{where}: layer", needed="a layer number")
    for name in ("output_norm", "output_rms"):
        value = getattr(stats, name)
        if value is not None and (type(value) is not float or not 0 <= value < math.inf):
            raise InputError(f"{value!r}"[:80], where=f"{where}: {name}", needed="a finite number, not negative")
    sizes |= {"F": stats.num_neurons, "D": stats.hidden_size}
    for name, (_, letters) in TENSORS.items():
        value = getattr(stats, name)
        if value is None:
            continue
        if value.ndim != len(letters) or not value.size:
            raise InputError(f"shape {list(value.shape)}", where=f"{where}: {name}", needed=f"[{', '.join(letters)}]")
        for letter, size in zip(letters, value.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise InputError(
                    f"shape {list(value.shape)}", where=f"{where}: {name}", needed=f"{letter} = {sizes[letter]}"
                )
        if problem := _problem(stats, name, value):
            raise InputError(problem, where=f"{where}: {name}")


def _problem(stats: NeuronStats, name: str, value: Array) -> str:
    """What is wrong with the numbers of a tensor of the right shape, or nothing."""
    if value.dtype == ml_dtypes.bfloat16:
        value = np.asarray(value).view(np.int16)  # as integers: ten times as fast, and -0 is refused with the negative
        if value.min() < 0 or value.max() >= 0x7F80:
            return "is negative or not finite"
    elif value.dtype.kind == "f":
        if not np.isfinite(value.max()) or not np.isfinite(value.min()):
            return "holds numbers that are not finite"
        if name not in ("mean", "inputs") and value.min() < 0:
            return "is negative"
    elif value.min() < (name == "cluster_tokens"):
        return "a data cluster without tokens" if name == "cluster_tokens" else "is negative"
    if name == "rate" and value.max() > 1:
        return "a share above 1"
    if name == "marks":
        if value.max() >= stats.num_neurons or (np.diff(value, axis=1) <= 0).any():
            return f"not ascending neurons below {stats.num_neurons}"
    elif name == "coactivation" and (value.max() > stats.num_tokens or (value != value.T).any()):
        return "not symmetric counts of at most num_tokens"
    elif name == "sample_clusters" and stats.cluster_tokens is not None and value.max() >= len(stats.cluster_tokens):
        return f"a data cluster that is not one of {len(stats.cluster_tokens)}"
    return ""
