"""How the benchmarks of training measure: CPU seconds, the least of several rounds over all sides in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismoe.folder import Manifest, hash_files
from prismoe.train.runtime import runtime

Side = tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]


def stock() -> AbstractContextManager[Any]:
    return runtime()


def tuned() -> AbstractContextManager[Any]:
    return runtime(fast_matmul=True, keep_memory=True)


def least(sides: Mapping[str, Side], times: int) -> dict[str, float]:
    """CPU seconds of each side, the least of `times` rounds; a round runs each twice, the first to settle."""
    best: dict[str, float] = {}
    for _ in range(times):
        for name, (work, settings) in sides.items():
            with settings():
                for turn in range(2):
                    begin = time.process_time()
                    work()
                    spent = time.process_time() - begin
                    if turn:
                        best[name] = min(best.get(name, spent), spent)
    return best


def verdict(value: float, goal: float, *, at_most: bool = False, unit: str = "x") -> str:
    met = value <= goal if at_most else value >= goal
    shown = (f"{100 * value:.0f} %", f"{100 * goal:.0f} %") if unit == "%" else (f"{value:.2f} x", f"{goal:g} x")
    return f"{shown[0]} (goal {'<=' if at_most else '>='} {shown[1]}: {'met' if met else 'MISSED'})"


def best_product(dtype: torch.dtype) -> float:
    """FLOP/s of the best matrix product here."""
    with tuned():
        left, right = torch.randn(1536, 1536).to(dtype), torch.randn(1536, 1536).to(dtype)
        seconds = least({"product": (lambda: left @ right.t(), tuned)}, 5)["product"]
    return 2 * 1536**3 / seconds


def copying() -> float:
    """Bytes read and written in a second by a large copy."""
    source, target = torch.randn(24 << 20), torch.randn(24 << 20)
    return 2 * source.nbytes / least({"copy": (lambda: target.copy_(source), stock)}, 5)["copy"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def domain_folder(folder: Path, vocab_size: int) -> Path:
    """Two splits of random ids in the format of the shards."""
    folder.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(3, vocab_size, 1 << 20).astype("<u2")
    splits = {}
    for split, ids in (("train", tokens), ("heldout", tokens[:1024])):
        ids.tofile(folder / f"{split}.tokens")
        np.array([[len(ids), len(ids)]], "<i8").tofile(folder / f"{split}.ends")
        splits[split] = {"num_tokens": len(ids), "num_documents": 1, "num_bytes": len(ids), "num_unknown": 0}
    config = {
        **{"name": folder.name, "vocab_size": vocab_size, "start_token": None, "end_token": 2},
        **{"tokenizer_sha256": "none", "splits": splits},
        "shards": {split: [{"name": split, "counts": counts}] for split, counts in splits.items()},
    }
    files = hash_files(folder, [f"{split}.{part}" for split in splits for part in ("tokens", "ends")])
    Manifest(kind="domain", parents={}, config=config, files=files).write(folder)
    return folder
