"""How alike the experts are: to each other, to the dense neurons they were cut from, to what they were before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from prismoe.report.heat import pair_panel, spread
from prismoe.report.page import Block, Figure, Findings, Panel, Section, Text
from prismoe.report.style import COLOURS, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from prismoe.routing.likeness import Similarity

__all__ = ["PLACE", "section"]

PLACE = 59
MOST_NAMED = 12
CURVES = {
    "dense_LE": ("expert_dense", "Experts against the dense neurons they were cut from", "cosine"),
    "drift_LE": (
        "expert_change",
        "How far experts have moved since the earlier checkpoint",
        "‖now − before‖ / ‖before‖",
    ),
}


def section(found: Findings) -> Section | None:
    """Of `prismoe similarity`."""
    from prismoe.routing.likeness import DUPLICATE, FILE, FOLDER, Similarity

    path = found.folder / FOLDER / FILE
    if not path.is_file():
        return None
    alike = Similarity.open(path)
    pairs = [f"layer {row.layer}: {row.first} and {row.second}" for row in alike.duplicates]
    more = f"; and {len(pairs) - MOST_NAMED} more pairs" if len(pairs) > MOST_NAMED else ""
    words = "; ".join(pairs[:MOST_NAMED]) + more if pairs else "none"
    blocks: list[Block] = [Text(f"Duplicate experts (cosine above {DUPLICATE}): {words}.", look="bad" if pairs else "")]
    blocks.append(_matrices(alike))
    for name, (figure, caption, label) in CURVES.items():
        values_LE = getattr(alike, name)
        if values_LE is not None and np.isfinite(values_LE).any():
            shows = f"{caption}: {np.nanmin(values_LE):.3f} to {np.nanmax(values_LE):.3f}"
            panel = Panel(partial(_curve, layers=alike.layers, values_LE=values_LE, label=label), shows, height=2.6)
            about = "Mean of a layer's experts; the band is all of them. Definitions: docs/experts.md."
            blocks.append(Figure(figure, caption, [panel], about))
    return Section("experts", "How alike the experts are", blocks)


def _matrices(alike: Similarity) -> Figure:
    panels = []
    for index in spread(len(alike.layers)):
        matched_EE = np.nan_to_num(alike.matched_LEE[index])
        apart = matched_EE[~np.eye(alike.num_experts, dtype=bool)]
        layer = alike.layers[index]
        shows = f"Layer {layer}: {apart.min():.2f} to {apart.max():.2f} between different experts"
        panels.append(pair_panel(matched_EE, layer=layer, top=1.0, label="cosine", shows=shows, of="of the "))
    about = (
        "For each neuron of the row's expert the cosine of the neuron of the column's expert most like it, mean over "
        "neurons: 1 are copies, in whatever order. Definitions: docs/experts.md."
    )
    return Figure("expert_similarity", "Similarity of experts, neuron by neuron", panels, about)


def _curve(axes: Axes, *, layers: Sequence[int], values_LE: Any, label: str) -> None:
    low, mean, high = np.nanmin(values_LE, axis=1), np.nanmean(values_LE, axis=1), np.nanmax(values_LE, axis=1)
    axes.fill_between(layers, low, high, color=COLOURS[5], alpha=0.4, linewidth=0)
    axes.plot(layers, mean, color=COLOURS[0], marker="o", markersize=4, linewidth=1.4)
    axes.set(xlabel="layer", ylabel=label)
    whole_numbers(axes)
