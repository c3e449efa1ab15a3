"""Columns of one down_proj into experts (P6): our gather against numpy, torch and a plain copy of the same bytes.

    python benchmarks/gather.py --work DIR            # 4096 × 11008 bfloat16, 16 experts, one thread

CPU seconds of one thread, the least of the rounds, all in turn in every round. Ours is what `convert` runs: windows of
4 MiB from the mapped file; with and without the look for NaN that comes with it.
"""

# Threads are pinned before torch loads.
# ruff: noqa: E402
from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from convert import clear
from synthetic import Shape, synthetic

from prismoe import Checkpoint
from prismoe.convert.gather import ROWS, Gatherer
from prismoe.convert.layout import lay_out
from prismoe.convert.writer import CHUNK
from prismoe.recipe import Take

COPY = "copy of the bytes"
DOWN = "model.layers.0.mlp.down_proj.weight"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for a checkpoint of one layer")
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    source = given.work / "one-layer"
    clear(source)
    synthetic(source, Shape(given.rows, given.columns, 1, given.rows // 128, given.rows // 128, 512), shards=1)
    checkpoint = Checkpoint.open(source)
    order = np.random.default_rng(0).permutation(given.columns).astype(np.int32)
    experts = np.sort(order.reshape(given.experts, -1), axis=1)
    stored: Any = checkpoint.array(DOWN).view(np.uint16)
    matrix = np.array(stored)  # in memory, for the others
    tensor, indices = (
        torch.from_numpy(matrix.view(np.int16)),
        [torch.from_numpy(row.astype(np.int64)) for row in experts],
    )
    wide = experts.astype(np.intp)
    copied, out = np.empty_like(matrix), bytearray(matrix.nbytes // given.experts)
    kept = np.empty((given.experts, given.rows, given.columns // given.experts), np.uint16)
    takes = {str(e): Take(DOWN, 1, row) for e, row in enumerate(experts)}
    shards = lay_out(takes, checkpoint.tensors, max_shard_bytes=1 << 62)
    pieces = [piece for shard in shards for piece in shard.pieces]
    with Gatherer.reading(checkpoint) as gatherer:

        def ours(look: bool) -> None:
            for piece in pieces:
                for low in range(0, piece.nbytes, CHUNK):
                    high = min(low + CHUNK, piece.nbytes)
                    gatherer.fill(replace(piece, check=look), low, high, memoryview(out)[low:high])

        def all_experts() -> None:
            """Every row block is read once, not once for each expert; the whole layer then has to stay in memory."""
            block = np.empty((ROWS, given.columns), np.uint16)
            for row in range(0, given.rows, ROWS):
                part = block[: given.rows - row]
                np.take(matrix[row : row + ROWS], wide.ravel(), axis=1, out=part, mode="clip")
                kept[:, row : row + ROWS] = part.reshape(len(part), given.experts, -1).swapaxes(0, 1)

        ways: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(False),
            "ours, looking for NaN": lambda: ours(True),
            "numpy take(axis=1)": lambda: [np.take(matrix, row, axis=1) for row in wide],
            "numpy fancy index": lambda: [matrix[:, row] for row in wide],
            "torch index_select": lambda: [torch.index_select(tensor, 1, row) for row in indices],
            "all experts in one pass": all_experts,
            COPY: lambda: np.copyto(copied, matrix),
        }
        for piece, row in zip(pieces, wide, strict=True):  # the same result, before anything is timed
            whole = bytearray(piece.nbytes)
            gatherer.fill(piece, 0, piece.nbytes, memoryview(whole))
            assert whole == np.take(matrix, row, axis=1).tobytes()
        all_experts()
        assert (kept == np.stack([np.take(matrix, row, axis=1) for row in wide])).all()
        taken = dict.fromkeys(ways, np.inf)
        for _ in range(given.rounds):
            for name, way in ways.items():
                started = time.process_time()
                way()
                taken[name] = min(taken[name], time.process_time() - started)
    clear(source)
    print(f"{given.rows} x {given.columns} bfloat16, {given.experts} experts, load {os.getloadavg()[0]:.1f}")
    for name, seconds in taken.items():
        ratio = seconds / taken[COPY]
        print(f"  {name:24} {1e3 * seconds:7.1f} ms   {seconds / taken['ours']:5.2f} x ours   {ratio:5.2f} x the copy")
    faster = taken["numpy take(axis=1)"] / taken["ours"]
    print(f"  goal >= 1.5 x numpy take(axis=1): {faster:.2f}, {'met' if faster >= 1.5 else 'MISSED'}")
    print(f"  goal <= 2.5 x the copy, with a compiled kernel: there is none; {taken['ours'] / taken[COPY]:.1f}")


if __name__ == "__main__":
    main()
