"""A heat map as a panel: cells of a good size for any number of them, and room for the names around."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from prismoe.report.page import Panel
from prismoe.report.style import heat_map, name_cells, number_cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["heat_panel", "pair_panel", "spread"]

LETTER = 0.072  # inches of a letter of 8 points
BAR = 0.85  # inches of the bar with its numbers and its label
SIDES = {"wide": (1.5, 4.3), "high": (1.5, 6.0)}  # inches of the cells together, least and most
MOST_LAYERS = 4  # that a figure shows one by one
NUMBERED = 0.26  # inches that a cell must have to carry a number


def heat_panel(
    grid: Any,
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    top: float,
    label: str,
    shows: str,
    title: str = "",
    axes: tuple[str, str] = ("", ""),
    cell: tuple[float, float] = (0.13, 0.13),
    form: str = ".1f",
    upright: bool = False,
) -> Panel:
    """`grid` [rows, columns] from 0 to `top`; `label` is what the colours mean, `axes` the words for x and y.

    `cell` is the size in inches that a cell likes to have; numbers of format `form` are written where they have room.
    """
    grid = np.asarray(grid, np.float64)
    inside = [
        min(max(count * size, SIDES[side][0]), SIDES[side][1])
        for count, size, side in zip(reversed(grid.shape), cell, ("wide", "high"), strict=True)
    ]
    left = 0.12 + LETTER * max(map(len, rows)) + (0.24 if axes[1] else 0.0)
    bottom = 0.12 + (LETTER * max(map(len, columns)) if upright else 0.14) + (0.22 if axes[0] else 0.0)
    head = 0.3 if title else 0.1
    fits = min(inside[0] / grid.shape[1], inside[1] / grid.shape[0] * 1.4) >= NUMBERED
    return Panel(
        partial(
            _draw,
            grid=grid,
            columns=columns,
            rows=rows,
            top=top,
            label=label,
            words=axes,
            form=form if fits else "",
            upright=upright,
        ),
        shows,
        title,
        width=left + inside[0] + BAR,
        height=bottom + inside[1] + head,
        margins=(left, BAR, bottom, head),
    )


def spread(count: int) -> list[int]:
    """Some of `count` layers, evenly from the first to the last."""
    shown = min(MOST_LAYERS, count)
    return sorted({round(place * (count - 1) / max(shown - 1, 1)) for place in range(shown)})


def pair_panel(grid_EE: Any, *, layer: int, top: float, label: str, shows: str, of: str = "") -> Panel:
    """A number for every two experts of a layer, 0 where there is none; `of` are words before the row's expert."""
    names, side = [str(expert) for expert in range(len(grid_EE))], max(0.14, min(0.27, 2.4 / len(grid_EE)))
    return heat_panel(
        np.nan_to_num(grid_EE, nan=0.0).clip(0.0),
        columns=names,
        rows=names,
        top=top,
        label=label,
        shows=shows,
        title=f"layer {layer}",
        axes=("expert", f"{of}expert"),
        cell=(side, side),
    )


def _draw(
    axes: Axes,
    *,
    grid: Any,
    columns: Sequence[str],
    rows: Sequence[str],
    top: float,
    label: str,
    words: tuple[str, str],
    form: str,
    upright: bool,
) -> None:
    heat_map(axes, grid, top=top, label=label)
    name_cells(axes, columns, rows, upright=upright)
    if form:
        number_cells(axes, grid, top=top, form=form)
    axes.set(xlabel=words[0], ylabel=words[1])
