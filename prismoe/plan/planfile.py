"""One layer of a plan as it is stored: a readable row of the header and the tensors that need bytes.

What is usual is not written: copies of all neurons, a scale on down alone, experts without groups or changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.layerplan import LayerPlan, Noise, Redraw, RouterDraw

__all__ = ["Tensors", "pack_layer", "unpack_layer"]

MAX_EXPERTS = 4096  # a damaged header must not ask for more memory than this
ALL, ALIKE, STORED = "all neurons", "all alike", "stored"
REQUIRED = {"num_experts", "experts", "shared", "scale", "router"}
OPTIONAL = {"spread", "group", "noise", "redraw", "donors"}

Tensors = dict[str, npt.NDArray[Any]]
Stored = Callable[[str, str], npt.NDArray[Any]]


def pack_layer(layer: LayerPlan, *, at: str, num_neurons: int) -> tuple[dict[str, Any], Tensors]:
    """Header row, and tensors named below `at` ("layers.3")."""
    tensors: Tensors = {}
    experts = np.asarray(layer.experts, np.int32)
    if experts.shape[1] == num_neurons:
        kind = ALL
    elif len(experts) > 1 and (experts == experts[0]).all():  # copies beside a shared expert: one row says it
        kind, tensors[f"{at}.experts"] = ALIKE, experts[:1]
    else:
        kind, tensors[f"{at}.experts"] = STORED, experts
    if len(layer.shared):
        tensors[f"{at}.shared"] = layer.shared.astype(np.int32)
    drawn = isinstance(layer.router, RouterDraw)
    if not drawn:
        tensors[f"{at}.router"] = np.asarray(layer.router, np.float32)
    row: dict[str, Any] = {
        "num_experts": len(experts),
        "experts": kind,
        "shared": len(layer.shared),
        "scale": float(layer.scale),
        "router": asdict(layer.router) if isinstance(layer.router, RouterDraw) else "stored",
    }
    row |= {"spread": layer.spread} if layer.spread != "down" else {}
    row |= {"group": layer.group} if layer.group != 1 else {}
    row |= {"noise": asdict(layer.noise)} if layer.noise is not None else {}
    row |= {"donors": list(layer.donors)} if layer.donors else {}
    if layer.redraw is not None:
        row["redraw"] = {"seed": layer.redraw.seed}
        tensors[f"{at}.redraw.slots"] = layer.redraw.slots.astype(np.int32)
        tensors[f"{at}.redraw.moments"] = layer.redraw.moments.astype(np.float32)
    return row, tensors


def unpack_layer(row: dict[str, Any], stored: Stored, *, at: str, where: str, num_neurons: int) -> LayerPlan:
    """The layer of a header row; `stored(name, dtype)` gives its tensors.

    Raises:
        InputError, KeyError, TypeError: the row is damaged; what it says about neurons is checked by the caller.
    """
    if unknown := sorted(row.keys() - REQUIRED - OPTIONAL):
        raise InputError(f"unknown key {unknown[0]!r}"[:80], where=f"{where}: {at}", hint="a newer prismoe may know it")
    count, router, kind = row["num_experts"], row["router"], row["experts"]
    if type(count) is not int or not 0 < count <= MAX_EXPERTS:
        raise TypeError(f"{count!r} is not a count")
    if kind == ALL:
        experts = np.broadcast_to(np.arange(num_neurons, dtype=np.int32), (count, num_neurons))
    else:
        experts, rows = stored(f"{at}.experts", "I32"), {ALIKE: 1, STORED: count}[kind]
        if experts.shape[:1] != (rows,):
            raise InputError(f"shape {list(experts.shape)}", where=f"{where}: {at}", needed=f"{rows} rows")
        if kind == ALIKE:
            experts = np.broadcast_to(experts[0], (count, *experts.shape[1:]))
    redraw = None
    if "redraw" in row:
        slots, moments = stored(f"{at}.redraw.slots", "I32"), stored(f"{at}.redraw.moments", "F32")
        redraw = Redraw(slots=slots, moments=moments, **row["redraw"])
    return LayerPlan(
        experts=experts,
        shared=stored(f"{at}.shared", "I32") if row["shared"] else np.empty(0, np.int32),
        router=stored(f"{at}.router", "F32") if router == "stored" else RouterDraw(**router),
        scale=row["scale"],
        spread=row.get("spread", "down"),
        group=row.get("group", 1),
        redraw=redraw,
        noise=Noise(**row["noise"]) if "noise" in row else None,
        donors=tuple(row.get("donors", ())),
    )
