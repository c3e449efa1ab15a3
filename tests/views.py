"""Layers for methods to look at: random weights and statistics with a shape, no model."""

from __future__ import annotations

from typing import Any

import numpy as np

from prismoe.checkpoint import FFN
from prismoe.layerplan import LayerView, no_statistics
from prismoe.stats import NeuronStats

HIDDEN = 16


def random_ffn(neurons: int, *, hidden: int = HIDDEN, seed: int = 0) -> FFN:
    draw = np.random.default_rng(seed)
    gate_FD, up_FD, down_FD = draw.standard_normal((3, neurons, hidden)).astype(np.float32)
    return FFN(gate_FD=gate_FD, up_FD=up_FD, down_DF=np.ascontiguousarray(down_FD.T))


def statistics(neurons: int, *, hidden: int = HIDDEN, **found: Any) -> NeuronStats:
    return NeuronStats(layer=0, num_neurons=neurons, hidden_size=hidden, num_tokens=1000, **found)


def view(
    neurons: int = 24,
    *,
    top_k: int = 2,
    seed: int = 0,
    index: int = 0,
    hidden: int = HIDDEN,
    ffn: FFN | None = None,
    stats: NeuronStats | None = None,
) -> LayerView:
    """A layer with random weights (or `ffn`) and the given statistics."""
    return LayerView(
        index=index,
        num_neurons=neurons,
        hidden_size=hidden,
        top_k=top_k,
        seed=seed,
        ffn=lambda: ffn or random_ffn(neurons, hidden=hidden, seed=1),
        stats=no_statistics if stats is None else lambda: stats,
    )


def full_statistics(neurons: int, *, hidden: int = HIDDEN, clusters: int = 4, tokens: int = 64, seed: int = 0) -> Any:
    """Every quantity that a method may ask for, from random numbers."""
    draw = np.random.default_rng(seed)
    marks = np.sort(np.argsort(draw.random((tokens, neurons)), axis=1)[:, : max(1, neurons // 4)], axis=1)
    marked = np.zeros((tokens, neurons), np.int32)
    np.put_along_axis(marked, marks, 1, axis=1)
    return statistics(
        neurons,
        hidden=hidden,
        mean_square=draw.random(neurons).astype(np.float32),
        cluster_tokens=draw.integers(1, 50, clusters),
        importance=draw.random((clusters, neurons)).astype(np.float32),
        marks=marks.astype(np.int32),
        coactivation=(marked.T @ marked).astype(np.int32),
        inputs=draw.standard_normal((tokens, hidden)).astype(np.float32),
        scores=draw.random((tokens, neurons)).astype(np.float32),
    )
