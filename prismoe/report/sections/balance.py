"""Routers while they train: who gets how many tokens, how decided they are, how far experts have come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.report.heat import heat_panel
from prismoe.report.page import Block, Figure, Findings, Panel, Section, Text
from prismoe.report.style import COLOURS, reference_line, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "section"]

PLACE = 34
Lines = Sequence[Mapping[str, Any]]
CURVES = {
    "entropy": ("router_entropy", "Router entropy, share of the largest (1 is undecided)", "entropy / ln E"),
    "router_loss": ("router_loss", "Balance loss, as it was added to the loss", "loss"),
}


def section(found: Findings) -> Section | None:
    """Of the log of the stage `pretrain`, where a mixture trained."""
    steps, evals = found.events("step"), found.events("eval")
    if not steps or not evals or "load" not in evals[0]:
        return None
    import numpy as np

    chosen = [evals[0], evals[-1]] if len(evals) > 1 else [evals[0]]
    grids = [np.array(row["load"]) * len(row["load"][0]) for row in chosen]
    top = max(2.0, *(float(grid.max()) for grid in grids))
    layers, experts = grids[0].shape
    panels = [
        heat_panel(
            grid,
            columns=[str(expert) for expert in range(experts)],
            rows=[str(layer) for layer in range(layers)],
            top=top,
            label="load / mean load",
            shows=f"Load by layer and expert at step {row['step']}: {grid.min():.2f} to {grid.max():.2f} × the mean",
            title=f"step {row['step']}",
            axes=("expert", "layer"),
            cell=(0.26, 0.19),
        )
        for row, grid in zip(chosen, grids, strict=True)
    ]
    about = "Tokens of an expert over the mean of its layer: 1 is balanced, 0 is idle."
    blocks: list[Block] = [Figure("load", "Load of every expert on held-out text", panels, about)]
    busiest = steps[-1]["max_over_mean"]
    panel = Panel(partial(_busiest, steps=steps), f"Largest load over the mean, {busiest:.2f} at the end", height=2.4)
    blocks.append(Figure("balance", "Busiest expert of the worst layer (1 is balanced)", [panel]))
    for key, (name, caption, label) in CURVES.items():
        if key in steps[0]:
            shows = f"{caption}: {steps[0][key]:.3g} at first, {steps[-1][key]:.3g} at last"
            blocks.append(
                Figure(name, caption, [Panel(partial(_curve, steps=steps, key=key, label=label), shows, height=2.4)])
            )
    if "expert_cosine" in evals[0] and len(evals) > 1:
        end = evals[-1]["expert_cosine"]
        panel = Panel(partial(_drift, evals=evals), f"Cosine at the end, {min(end):.3f} to {max(end):.3f}", height=2.4)
        about = "Cosine of an expert's weights with those it began with, mean of a layer; the band is all layers."
        blocks.append(Figure("expert_drift", "How far experts have moved", [panel], about))
    if idle := evals[-1].get("idle"):
        blocks.append(
            Text(f"At the end {idle} of {layers * experts} experts had no token of held-out text.", look="bad")
        )
    return Section("balance", "Balance while training", blocks)


def _busiest(axes: Axes, *, steps: Lines) -> None:
    x, mean, low, high = thinned([row["step"] for row in steps], [row["max_over_mean"] for row in steps])
    axes.fill_between(x, low, high, color=COLOURS[1], alpha=0.25, linewidth=0)
    axes.plot(x, mean, color=COLOURS[1], linewidth=1.2)
    reference_line(axes, 1.0)
    axes.set(xlabel="step", ylabel="largest / mean load", ylim=(0, None))


def _curve(axes: Axes, *, steps: Lines, key: str, label: str) -> None:
    x, mean, low, high = thinned([row["step"] for row in steps], [row[key] for row in steps])
    axes.fill_between(x, low, high, color=COLOURS[5], alpha=0.5, linewidth=0)
    axes.plot(x, mean, color=COLOURS[0], linewidth=1.4)
    axes.set(xlabel="step", ylabel=label)


def _drift(axes: Axes, *, evals: Lines) -> None:
    steps, layers = [row["step"] for row in evals], [row["expert_cosine"] for row in evals]
    axes.fill_between(
        steps, [min(row) for row in layers], [max(row) for row in layers], color=COLOURS[5], alpha=0.4, linewidth=0
    )
    axes.plot(steps, [sum(row) / len(row) for row in layers], color=COLOURS[0], linewidth=1.4, marker="o", markersize=4)
    axes.set(xlabel="step", ylabel="cosine")
