"""Neurons that fire together in one expert (MoEfication, 2110.01786): METIS cuts the graph of co-activations."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from prismoe.balance.assignment import assign
from prismoe.errors import UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw, equal_width


def calibration(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What it asks of `calibrate`."""
    return {"quantities": ("coactivation",)}


def ready() -> None:
    """Whether a plan can be made at all, to be asked before an hour of calibration.

    Raises:
        UsageError: METIS is missing.
    """
    try:
        import pymetis  # noqa: F401
    except ImportError:
        hint = "pip install 'prismoe[metis]'"
        raise UsageError("METIS is not installed", where="method coactivation", hint=hint) from None


def split(
    layer: LayerView,
    *,
    num_experts: Annotated[int, Field(ge=1, le=4096)] = 8,
    edges: Annotated[int, Field(ge=1)] = 128,
) -> LayerPlan:
    """Cut F neurons into `num_experts` equal parts with little co-activation between them, scaled by E/K.

    The graph keeps the `edges` heaviest edges of each neuron (of equal ones the first), which bounds its size. METIS
    gives parts of nearly equal size; they are made equal by the assignment that keeps the most co-activation with them.

    Raises:
        UsageError: METIS or the calibration is missing, or the neurons do not divide evenly.
    """
    width = equal_width(layer, num_experts=num_experts)
    ready()
    import pymetis

    counts_FF = layer.stats().need("coactivation")
    labels = np.zeros(layer.num_neurons, np.int64)
    starts, neighbours, weights = _graph(counts_FF, edges)
    if num_experts > 1 and len(neighbours):
        graph = pymetis.CSRAdjacency(adj_starts=starts, adjacent=neighbours)
        options = pymetis.Options(seed=int(layer.generator().integers(2**31)))
        labels[:] = pymetis.part_graph(num_experts, graph, eweights=weights, recursive=False, options=options)[1]
    labels = _made_equal(counts_FF, labels, num_experts)
    return LayerPlan(
        experts=np.argsort(labels, kind="stable").reshape(num_experts, width).astype(np.int32),
        shared=np.empty(0, np.int32),
        router=RouterDraw(std=0.02, seed=layer.seed),
        scale=num_experts / layer.top_k,
    )


def _graph(counts_FF: npt.NDArray[np.int32], edges: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Compressed rows (starts, neighbours, weights) of a symmetric graph: an edge that either end keeps is there."""
    num_neurons = len(counts_FF)
    first, second = [], []
    for neuron, row in enumerate(counts_FF):
        row = row.copy()
        row[neuron] = 0
        best = np.argsort(-row, kind="stable")[:edges]
        best = best[row[best] > 0]
        first.append(np.full(len(best), neuron))
        second.append(best)
    i, j = np.concatenate(first), np.concatenate(second)
    pairs = np.unique(np.concatenate([i * num_neurons + j, j * num_neurons + i]))
    i, j = np.divmod(pairs, num_neurons)
    starts = np.concatenate([[0], np.cumsum(np.bincount(i, minlength=num_neurons))])
    return starts.astype(np.int64), j.astype(np.int64), counts_FF[i, j].astype(np.int64)


def _made_equal(
    counts_FF: npt.NDArray[np.int32], labels: npt.NDArray[np.int64], num_experts: int
) -> npt.NDArray[np.int64]:
    """Labels with equal counts: as METIS has them where it can be, by co-activation with its parts where not."""
    member_FE = np.eye(num_experts)[labels]
    together_FE = counts_FF.astype(np.float64) @ member_FE - np.diag(counts_FF)[:, None] * member_FE
    together_FE /= np.maximum(together_FE.max(), 1.0)
    return assign(-together_FE - 2.0 * member_FE).labels
