"""The folder that a recovery leaves: the mixture's own tensors, some of them replaced by those of the layer files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import read_header
from prismoe.convert.job import PLAN
from prismoe.convert.layout import lay_out
from prismoe.convert.stream import Output
from prismoe.recipe import Copy, Recipe, Take
from prismoe.recover.block import down_keys
from prismoe.recover.job import KIND, TOP_K, Job
from prismoe.recover.layers import LayerDone

__all__ = ["RECEIPT", "recovered_folder"]

RECEIPT = "recovery.json"
SHARD_BYTES = 5_000_000_000


class _Overlaid(Checkpoint):
    """A checkpoint with the tensors of further files in place of its own."""

    def __init__(self, below: Checkpoint, files: Iterable[Path]) -> None:
        self._below = below
        self.folder, self.config = below.folder, below.config
        above = {name: info for file in files for name, info in read_header(file)[0].items()}
        self.tensors = MappingProxyType({**below.tensors, **above})
        self._maps = {}
        self._manifest = None

    def check(self, file: Path) -> None:
        if file.parent == self.folder:
            self._below.check(file)


def recovered_folder(job: Job, done: list[LayerDone], top_k: tuple[int, ...], receipt: dict[str, Any]) -> Output:
    """All that will be in the folder; `top_k` is the K of each layer with experts, in the order of `done`."""
    whole = _Overlaid(job.moe, [layer.file for layer in done])
    recipes: dict[str, Recipe] = {name: Copy(name) for name in whole.tensors}
    for layer, k in zip(done, top_k, strict=True):
        if (factor := layer.measured.factors[k - 1]) != 1.0:
            for name in down_keys(job.target, layer.layer, num_experts=job.num_experts):
                index = np.arange(whole.tensors[name].shape[0], dtype=np.int32)
                recipes[name] = Take(name, 0, index, factor=factor)
    files = {path.name: path.read_bytes() for path in job.moe.side_files}
    if job.plan is not None and len(set(top_k)) == 1:
        files[PLAN] = replace(job.plan, top_k=top_k[0]).to_bytes()
    files[RECEIPT] = (json.dumps(receipt, indent=2, sort_keys=True) + "\n").encode()
    return Output(
        kind=KIND,
        checkpoint=whole,
        settings=job.settings,
        config=_config(job, top_k),
        shards=lay_out(recipes, whole.tensors, max_shard_bytes=SHARD_BYTES),
        files=files,
        parents=job.parents,
        key=job.key,
    )


def _config(job: Job, top_k: tuple[int, ...]) -> dict[str, Any]:
    """config.json with the new K under every name that it has there; of several, under the one that can hold them."""
    config = dict(job.moe.config)
    if len(set(top_k)) == 1:
        return config | {name: top_k[0] for name in TOP_K if name in config}
    by_layer = dict(zip(job.layers, top_k, strict=True))
    listed = [by_layer.get(layer, job.top_k) for layer in range(job.dense.family.num_layers)]
    return {name: value for name, value in config.items() if name not in TOP_K} | {job.target.top_k_by_layer: listed}
