"""What a plan does with the neurons: who holds them, how far experts overlap, how much importance each covers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError, PrismoeError
from prismoe.folder import MANIFEST
from prismoe.layerplan import LayerPlan, RouterDraw
from prismoe.plan import Plan
from prismoe.progress import Progress, quiet
from prismoe.stats.calibration import Calibration

__all__ = ["Anatomy", "Covered", "LayerAnatomy", "calibration_beside", "plan_anatomy"]

STATISTICS = "calibration"  # beside the plan of a run, and beside the folder that it was converted into

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Matrix = list[list[float]]


@dataclass(frozen=True)
class Covered:
    """Shares of a data cluster's total importance: [C] of the shared expert, [E][C] of each routed one, [C] of nobody.

    best [C]: of the shared expert and the top_k experts that cover most of the cluster, together. size [C]: the share
    of all neurons that these are, which is what as many random neurons cover on average.
    """

    shared: list[float]
    experts: Matrix
    nobody: list[float]
    best: list[float]
    size: list[float]


@dataclass(frozen=True)
class LayerAnatomy:
    """One layer, of experts `width` wide. Counts of neurons: in no expert and not shared, in one routed expert, in
    several, shared (whether or not routed too).

    overlap [E][E]: |A∩B| / W of every two experts; None where it is the identity. router: how its rows begin.
    """

    layer: int
    width: int
    scale: float
    router: str
    nobody: int
    one: int
    several: int
    shared: int
    overlap: Matrix | None
    covered: Covered | None


@dataclass(frozen=True)
class Anatomy:
    """`kind` is "partition" (no two experts hold one neuron), "copies" (all hold the same) or "overlap". `overlap` is
    the mean over the layers, None for a partition. `clusters` names the data clusters by their commonest domain,
    where importance was looked at.
    """

    num_neurons: int
    num_experts: int
    top_k: int
    kind: str
    overlap: Matrix | None
    clusters: list[str] | None
    covered: Covered | None  # mean over the layers
    layers: tuple[LayerAnatomy, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def plan_anatomy(
    plan: Plan, *, calibration: str | Path | Calibration | None = None, on_progress: Progress = quiet
) -> Anatomy:
    """Look at every layer that has experts; with a calibration of the same checkpoint also at importance.

    Raises:
        InputError: a calibration of another checkpoint, without importances, or damaged.
    """
    found = (
        calibration if calibration is None or isinstance(calibration, Calibration) else Calibration.open(calibration)
    )
    if found is not None:
        _check_calibration(plan, found)
    layers = []
    for index, layer in enumerate(plan.layers):
        if layer is not None:
            importance = None if found is None else np.asarray(found.layer(index).need("importance"), np.float64)
            layers.append(_layer(index, layer, plan, importance))
        on_progress("looking at layers", index + 1, len(plan.layers))
    overlaps = [layer.overlap for layer in layers]
    num_experts = next(len(layer.experts) for layer in plan.layers if layer is not None)
    mean = None
    if any(overlap is not None for overlap in overlaps):
        identity = np.eye(num_experts)
        mean = np.stack([identity if overlap is None else np.array(overlap) for overlap in overlaps]).mean(axis=0)
    covered = [layer.covered for layer in layers if layer.covered is not None]
    return Anatomy(
        num_neurons=plan.num_neurons,
        num_experts=num_experts,
        top_k=plan.top_k,
        kind="partition" if mean is None else "copies" if num_experts > 1 and (mean == 1).all() else "overlap",
        overlap=None if mean is None else mean.tolist(),
        clusters=None if found is None else _cluster_names(found),
        covered=_mean(covered) if covered else None,
        layers=tuple(layers),
    )


def calibration_beside(path: Path, plan: Plan) -> tuple[Calibration | None, list[str]]:
    """The calibration of the run that the plan file lies in, where a finished one fits; else why not."""
    folder = next(
        (at / STATISTICS for at in path.resolve().parents[:2] if (at / STATISTICS / MANIFEST).is_file()), None
    )
    if folder is None:
        return None, ["importance was not looked at: no calibration beside the plan (calibration=FOLDER names one)"]
    try:
        found = Calibration.open(folder)
    except PrismoeError as error:
        return None, [f"importance was not looked at: {error}"]
    if found.source != plan.origin.source or found.num_layers != len(plan.layers):
        return None, [f"importance was not looked at: {folder} is of another checkpoint"]
    if "importance" not in found.quantities:
        return None, [f"importance was not looked at: {folder} has none"]
    return found, []


def _check_calibration(plan: Plan, found: Calibration) -> None:
    where = str(found.folder)
    if found.source != plan.origin.source or found.num_layers != len(plan.layers):
        raise InputError(
            f"a calibration of checkpoint {found.source[:16]}", where=where, needed=f"of {plan.origin.source[:16]}"
        )
    if "importance" not in found.quantities:
        raise InputError("a calibration without importance", where=where, hint="calibrate with quantity importance")


def _layer(index: int, layer: LayerPlan, plan: Plan, importance_CF: Floats | None) -> LayerAnatomy:
    held_EF = np.zeros((len(layer.experts), plan.num_neurons), bool)
    np.put_along_axis(held_EF, layer.experts, True, axis=1)
    shared_F = np.zeros(plan.num_neurons, bool)
    shared_F[layer.shared] = True
    counts = held_EF.sum(axis=0)
    as_numbers = held_EF.astype(np.float32)  # counts below 2^24 are exact
    common = (as_numbers @ as_numbers.T).astype(np.float64) / layer.experts.shape[1]
    alone = np.array_equal(common, np.eye(len(common)))
    return LayerAnatomy(
        layer=index,
        width=layer.experts.shape[1],
        scale=float(layer.scale),
        router=_router(layer),
        nobody=int(((counts == 0) & ~shared_F).sum()),
        one=int((counts == 1).sum()),
        several=int((counts > 1).sum()),
        shared=len(layer.shared),
        overlap=None if alone else common.tolist(),
        covered=None if importance_CF is None else _covered(importance_CF, held_EF, shared_F, plan.top_k),
    )


def _router(layer: LayerPlan) -> str:
    if isinstance(layer.router, RouterDraw):
        return f"drawn, std {layer.router.std:g}" if layer.router.std else "zero"
    norms = np.linalg.norm(layer.router.astype(np.float64), axis=1)
    return f"stored, row norms {norms.min():.3g} to {norms.max():.3g}"


def _covered(importance_CF: Floats, held_EF: Bools, shared_F: Bools, top_k: int) -> Covered:
    totals_C = importance_CF.sum(axis=1)
    # A cluster to which nothing matters in this layer: every neuron matters alike.
    shares_CF = np.where(totals_C[:, None] > 0, importance_CF, 1.0)
    shares_CF = shares_CF / shares_CF.sum(axis=1, keepdims=True)
    experts_EC = held_EF.astype(np.float64) @ shares_CF.T
    best, size = [], []
    for column, shares_F in zip(experts_EC.T, shares_CF, strict=True):
        chosen = np.argsort(-column, kind="stable")[:top_k]
        active_F = held_EF[chosen].any(axis=0) | shared_F
        best.append(float(shares_F[active_F].sum()))
        size.append(float(active_F.mean()))
    nobody_F = ~(held_EF.any(axis=0) | shared_F)
    return Covered(
        shared=shares_CF[:, shared_F].sum(axis=1).tolist(),
        experts=experts_EC.tolist(),
        nobody=shares_CF[:, nobody_F].sum(axis=1).tolist(),
        best=best,
        size=size,
    )


def _mean(layers: list[Covered]) -> Covered:
    fields = ("shared", "experts", "nobody", "best", "size")
    return Covered(**{name: np.mean([getattr(layer, name) for layer in layers], axis=0).tolist() for name in fields})


def _cluster_names(found: Calibration) -> list[str]:
    """ "3 github" where most sequences of cluster 3 are of that domain; of equal ones the first."""
    names = []
    for cluster, counts in enumerate(found.cluster_domains):
        most = max(range(len(counts)), key=lambda domain: counts[domain])
        names.append(f"{cluster} {found.domains[most]}")
    return names
