"""A plan as a picture: who holds the neurons, how far experts overlap, how much importance each of them covers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prismoe.plan.anatomy import Anatomy, Covered
from prismoe.report.page import Figure, Panel
from prismoe.report.style import (
    COLOURS,
    heat_map,
    legend_above,
    name_cells,
    new_figure,
    number_cells,
    styled,
    whole_numbers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SUFFIXES", "figures", "picture_bytes"]

SUFFIXES = (".png", ".svg")
WIDTH, HEIGHT, DPI = 5.0, 3.7, 160  # of one panel, inches; dots an inch
MOST_NUMBERS = 10
HOLDERS = ("shared expert alone", "one expert", "several experts", "nobody")
HOLDER_COLOURS = (COLOURS[0], COLOURS[5], COLOURS[4], "#d0d0d0")

Drawn = tuple[str, Callable[..., None]]


def _panels(anatomy: Anatomy) -> list[Drawn]:
    found: list[Drawn] = [("Who holds the neurons of a layer", _holders)]
    if anatomy.overlap is not None:
        found.append(("Neurons two experts have in common, mean of layers", _overlap))
    if anatomy.covered is not None:
        found.append(("Importance covered by expert, mean of layers", _by_cluster))
        found.append(("Importance that is active for a data cluster", _by_layer))
    return found


@styled
def picture_bytes(anatomy: Anatomy, path: Path, *, title: str = "") -> bytes:
    """All panels as one file, of the kind that the suffix of `path` says."""
    panels = _panels(anatomy)
    columns = min(3 if len(panels) == 3 else 2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(WIDTH * columns, HEIGHT * rows + (0.35 if title else 0.0))
    # Each panel is laid out by itself: what is written around one does not push the others.
    grid = figure.subfigures(rows, columns, squeeze=False).ravel()
    for place, (caption, draw) in zip(grid, panels, strict=True):
        axes = place.subplots()
        draw(axes, anatomy)
        axes.set_title(caption, fontsize=10, loc="left", pad=24 if axes.get_legend() else 8)
    if title:
        figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    nothing = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    figure.savefig(buffer, format=path.suffix[1:], dpi=DPI, metadata=nothing)
    return buffer.getvalue()


def figures(anatomy: Anatomy) -> list[Figure]:
    """Each panel as a figure of a page; none where every layer's words say it all."""
    held_alike = all(0 in (row.one, row.several) and not row.shared and not row.nobody for row in anatomy.layers)
    if held_alike and anatomy.kind != "overlap" and anatomy.covered is None:
        return []
    return [
        Figure(
            f"plan_{draw.__name__.strip('_')}",
            caption,
            [Panel(partial(draw, anatomy=anatomy), caption, width=WIDTH, height=HEIGHT)],
        )
        for caption, draw in _panels(anatomy)
    ]


def _holders(axes: Axes, anatomy: Anatomy) -> None:
    rows = anatomy.layers
    layers = [row.layer for row in rows]
    parts = np.array(
        [[anatomy.num_neurons - row.one - row.several - row.nobody, row.one, row.several, row.nobody] for row in rows]
    )
    shares, below = 100 * parts.T / anatomy.num_neurons, np.zeros(len(rows))
    for name, colour, share in zip(HOLDERS, HOLDER_COLOURS, shares, strict=True):
        if share.any():
            axes.bar(
                layers, share, bottom=below, width=0.85, color=colour, edgecolor="white", linewidth=0.5, label=name
            )
        below += share
    axes.set(xlabel="layer", ylabel="% of neurons", ylim=(0, 100))
    axes.grid(visible=False, axis="x")
    whole_numbers(axes)
    legend_above(axes)


def _overlap(axes: Axes, anatomy: Anatomy) -> None:
    overlap = 100 * np.array(anatomy.overlap)
    heat_map(axes, overlap, top=100.0, label="% of an expert's neurons")
    if len(overlap) <= MOST_NUMBERS:
        number_cells(axes, overlap, top=100.0, form=".0f", size=8)
    names = [str(expert) for expert in range(len(overlap))]
    name_cells(axes, names, names)
    axes.set(xlabel="expert", ylabel="expert", aspect="equal")


def _by_cluster(axes: Axes, anatomy: Anatomy) -> None:
    covered, clusters = anatomy.covered, anatomy.clusters
    assert covered is not None
    assert clusters is not None
    width = float(np.mean([row.width for row in anatomy.layers])) / anatomy.num_neurons
    shared = float(np.mean([row.shared for row in anatomy.layers])) / anatomy.num_neurons
    rows, names, sizes = [*covered.experts], [str(e) for e in range(anatomy.num_experts)], [width] * anatomy.num_experts
    if shared:
        rows, names, sizes = [covered.shared, *rows], ["shared", *names], [shared, *sizes]
    shares = np.array(rows)
    times = shares / np.array(sizes)[:, None]
    top = max(2.0, float(times.max()))
    heat_map(axes, times, top=top, label="× as many random neurons")
    numbered = max(times.shape) <= MOST_NUMBERS + 1
    if numbered:
        number_cells(axes, times, top=top, text=100 * shares, form=".0f", size=8)
    name_cells(axes, clusters, names)
    if len(clusters) > 2:
        for label in axes.get_xticklabels():
            label.set(rotation=30, ha="right", rotation_mode="anchor")
    cells = " (in cells: % covered)" if numbered else ""
    axes.set(xlabel=f"data cluster, its commonest domain{cells}", ylabel="expert")


def _by_layer(axes: Axes, anatomy: Anatomy) -> None:
    rows = [row for row in anatomy.layers if row.covered is not None]
    layers = [row.layer for row in rows]

    def curve(pick: Callable[[Covered], Sequence[float]], label: str, **look: Any) -> None:
        values = np.array([100 * np.array(pick(row.covered)) for row in rows if row.covered is not None])
        axes.plot(layers, values.mean(axis=1), label=label, markersize=5, linewidth=1.6, **look)
        axes.fill_between(layers, values.min(axis=1), values.max(axis=1), color=look["color"], alpha=0.15, linewidth=0)

    best = f"{'shared + ' if any(row.shared for row in rows) else ''}best {anatomy.top_k}"
    curve(lambda found: found.best, best, color=COLOURS[0], marker="o")
    curve(lambda found: found.size, "as many at random", color="#555555", linestyle="--")
    if any(row.shared for row in rows):
        curve(lambda found: found.shared, "shared alone", color=COLOURS[1], marker="s")
    axes.set(
        xlabel="layer (band: from the lowest to the highest cluster)", ylabel="% of importance covered", ylim=(0, 100)
    )
    whole_numbers(axes)
    legend_above(axes)
