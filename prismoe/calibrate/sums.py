"""The sums behind the statistics of one layer, of one batch at a time: no model, no file.

On a CPU they run in NumPy over pieces that stay in cache, one sequence per thread; elsewhere in torch on the device.
Pieces are summed in float32, everything above them in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Importance", "activation_sums", "count_pairs", "importance_sums", "largest", "on_host"]

Array = npt.NDArray[Any]
Importance = Literal["l1", "square", "total", "total_square"]
PIECE = 1 << 18  # numbers of one piece: 1 MiB of float32


def activation_sums(h_BTF: torch.Tensor, *, num_marks: int) -> tuple[dict[str, Array], Array]:
    """Sums of h, |h| and h² over B and T ([F] float64 each), and the `largest` neurons of each token.

    With `num_marks` 0 the latter is [B, T, 0].
    """
    if not on_host(h_BTF):
        h_NF = h_BTF.flatten(0, 1).float()
        found = {"mean": h_NF, "mean_abs": h_NF.abs(), "mean_square": h_NF.square()}
        sums = {name: value.double().sum(0).cpu().numpy() for name, value in found.items()}
        marks_NK = found["mean_abs"].topk(num_marks, dim=1, sorted=False).indices.sort(dim=1).values
        return sums, marks_NK.view(*h_BTF.shape[:2], num_marks).cpu().numpy()
    values_BTF = _numpy(h_BTF)

    def one(row: int) -> tuple[Array, Array]:
        sums_3F, marks = np.zeros((3, values_BTF.shape[2])), []
        for piece in _pieces(values_BTF[row]):
            sums_3F[0] += piece.sum(axis=0)
            work = np.abs(piece)
            sums_3F[1] += work.sum(axis=0)
            if num_marks:
                marks.append(largest(work, num_marks))
            np.multiply(work, work, out=work)
            sums_3F[2] += work.sum(axis=0)
        return sums_3F, np.concatenate(marks) if marks else np.empty((values_BTF.shape[1], 0), np.int64)

    rows = _each(one, len(values_BTF))
    sums_3F = sum(row[0] for row in rows)
    return dict(zip(("mean", "mean_abs", "mean_square"), sums_3F, strict=True)), np.stack([row[1] for row in rows])


def importance_sums(h_BTF: torch.Tensor, g_BTF: torch.Tensor, *, kind: Importance) -> Array:
    """[B, F] float64: Σ_t κ(h·g) of each sequence, κ = |·| for "l1", (·)² for "square" and none for the totals."""
    if not on_host(h_BTF):
        scores_BTF = (h_BTF * g_BTF).double()
        scores_BTF = scores_BTF.abs() if kind == "l1" else scores_BTF.square() if kind == "square" else scores_BTF
        return np.asarray(scores_BTF.sum(1).cpu().numpy())
    left_BTF, right_BTF = _numpy(h_BTF), _numpy(g_BTF)

    def one(row: int) -> Array:
        sum_F = np.zeros(left_BTF.shape[2])
        for h, g in zip(_pieces(left_BTF[row]), _pieces(right_BTF[row]), strict=True):
            work = h * g
            if kind == "l1":
                np.abs(work, out=work)
            elif kind == "square":
                np.multiply(work, work, out=work)
            sum_F += work.sum(axis=0)
        return sum_F

    return np.stack(_each(one, len(left_BTF)))


def largest(values_TF: Array, count: int) -> Array:
    """[T, count] the columns with the `count` largest values of each row, ascending; of equal values the first."""
    num_rows, width = values_TF.shape
    if count == width:
        return np.broadcast_to(np.arange(width), (num_rows, width))
    parted_TF = values_TF.copy()
    parted_TF.partition(width - count, axis=1)
    threshold_T1 = parted_TF[:, width - count, None]
    marked_TF = values_TF >= threshold_T1
    columns = np.flatnonzero(marked_TF)
    if len(columns) != num_rows * count:  # equal values at the threshold
        above_TF = values_TF > threshold_T1
        equal_TF = marked_TF & ~above_TF
        room_T1 = count - above_TF.sum(axis=1, keepdims=True)
        columns = np.flatnonzero(above_TF | (equal_TF & (np.cumsum(equal_TF, axis=1) <= room_T1)))
    chosen: Array = columns.reshape(num_rows, count) - np.arange(0, num_rows * width, width)[:, None]
    return chosen


def count_pairs(counts_FF: npt.NDArray[np.int32], marks_NK: Array) -> None:
    """Add to `counts_FF` the tokens that mark neurons i ≤ j both; what lies below the diagonal is left alone."""
    width, num_marks = len(counts_FF), marks_NK.shape[1]
    if 8 * num_marks < width:  # few marks: touch the pairs; many: a matrix product is cheaper
        first, second = np.triu_indices(num_marks)
        for start in range(0, len(marks_NK), 4096):
            piece = marks_NK[start : start + 4096].astype(np.int64)
            pairs = (piece[:, first] * width + piece[:, second]).reshape(-1)
            np.add.at(counts_FF.reshape(-1), pairs, np.ones(len(pairs), np.int32))  # same dtype: the fast path
        return
    for start in range(0, len(marks_NK), 4096):
        piece = marks_NK[start : start + 4096]
        marked_NF = np.zeros((len(piece), width), np.float32)
        np.put_along_axis(marked_NF, piece.astype(np.int64), 1.0, axis=1)
        counts_FF += np.triu(marked_NF.T @ marked_NF).astype(np.int32)


def on_host(tensor: torch.Tensor) -> bool:
    """Whether NumPy can look at it."""
    return tensor.device.type == "cpu"


def _numpy(tensor: torch.Tensor) -> Array:
    found: Array = tensor.detach().float().contiguous().numpy()
    return found


def _pieces(values_TF: Array) -> list[Array]:
    rows = max(16, PIECE // values_TF.shape[1])
    return [values_TF[start : start + rows] for start in range(0, len(values_TF), rows)]


def _each(work: Callable[[int], Any], count: int) -> list[Any]:
    """Results in order, whatever the number of threads (as many as torch computes with)."""

    def quiet(row: int) -> Any:
        with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused with its layer's name
            return work(row)

    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        return [quiet(row) for row in range(count)]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(quiet, range(count)))
