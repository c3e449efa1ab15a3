"""The report's figures as SVG: narrow, so that letters stay readable on a phone, in colours everyone tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prismoe.report.style import COLOURS, MARKERS, new_figure, number_cells, styled, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["balance", "heldout_loss", "load", "norm_ratios", "scores", "training_loss"]

WIDTH, HEIGHT = 4.8, 3.0  # inches


@styled
def training_loss(steps: Sequence[Mapping[str, Any]]) -> str:
    """Language-model loss of every step, and its mean over a window of steps."""
    import numpy as np

    figure, axes = _figure()
    x, y = np.array([row["step"] for row in steps]), np.array([row["loss"] for row in steps])
    window = max(1, len(y) // 25)
    mean = np.convolve(y, np.ones(window) / window, mode="valid")
    axes.plot(x, y, color=COLOURS[5], linewidth=0.8, label="a step")
    axes.plot(
        x[window - 1 :], mean, color=COLOURS[0], linewidth=1.8, label=f"mean of {window} step{'s' * (window > 1)}"
    )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    return svg(figure)


@styled
def heldout_loss(evals: Sequence[Mapping[str, Any]]) -> str:
    """Held-out loss of every domain over the steps of training."""
    names = list(evals[0]["heldout"])
    figure, axes = _figure(legend_rows=-(-len(names) // 3))
    steps = [row["step"] for row in evals]
    for index, name in enumerate(names):
        losses = [row["heldout"][name]["loss"] for row in evals]
        axes.plot(steps, losses, label=name, markersize=4.5, linewidth=1.5, **_look(index))
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)")
    axes.legend(ncols=3, loc="lower left", bbox_to_anchor=(-0.12, 1.0), borderaxespad=0.2, columnspacing=1.0)
    return svg(figure)


@styled
def load(evals: Sequence[Mapping[str, Any]]) -> str:
    """Share of tokens per layer and expert over the mean share, before and after training (1 is balanced)."""
    import matplotlib as mpl
    import numpy as np

    colours = mpl.colormaps["cividis"].resampled(16)
    chosen = [evals[0], evals[-1]] if len(evals) > 1 else [evals[0]]
    grids = [np.array(row["load"]) * len(row["load"][0]) for row in chosen]
    layers, experts = grids[0].shape
    figure = new_figure(WIDTH, 1.5 + min(0.3 * layers, 6.0))
    panels = figure.subplots(1, len(chosen), sharey=True, squeeze=False)[0]
    top = max(2.0, float(max(grid.max() for grid in grids)))
    for axes, grid, row in zip(panels, grids, chosen, strict=True):
        # A mesh is drawn as shapes; an image would be a bitmap inside the page.
        mesh = axes.pcolormesh(grid, cmap=colours, vmin=0.0, vmax=top, edgecolors="white", linewidth=0.5)
        axes.grid(visible=False)
        axes.set(xlabel="expert", ylim=(layers, 0), title=f"step {row['step']}")
        axes.title.set_size(10)
        for side, count, most in ((axes.xaxis, experts, 8), (axes.yaxis, layers, 16)):
            shown = range(0, count, max(1, count // most))
            side.set_ticks([index + 0.5 for index in shown], [str(index) for index in shown])
        if experts <= 8 and layers <= 16:
            number_cells(axes, grid, top=top)
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(mesh, ax=panels, location="bottom", shrink=0.7, aspect=40, pad=0.04)
    bar.set_label("load / mean load")
    return svg(figure)


@styled
def balance(steps: Sequence[Mapping[str, Any]]) -> str:
    """The busiest expert's load over the mean, the largest over all layers, at every step (1 is balanced)."""
    figure, axes = _figure()
    axes.plot([row["step"] for row in steps], [row["max_over_mean"] for row in steps], color=COLOURS[1], linewidth=1.2)
    axes.axhline(1.0, color="#555555", linewidth=1.0, linestyle="--")
    axes.set(xlabel="step", ylabel="largest load / mean load", ylim=(0, None))
    return svg(figure)


@styled
def norm_ratios(layers: Sequence[Mapping[str, Any]]) -> str:
    """Size of the mixture's FFN output over the dense one's, by layer (1 is the dense size)."""
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in layers if row["kind"] != "dense" and isinstance(row["norm_ratio"], float)]
    figure, axes = _figure()
    axes.bar([row["layer"] for row in rows], [row["norm_ratio"] for row in rows], color=COLOURS[0], width=0.7)
    axes.axhline(1.0, color="#555555", linewidth=1.0, linestyle="--")
    axes.set(xlabel="layer", ylabel="‖mixture‖ / ‖dense‖")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return svg(figure)


@styled
def scores(receipt: Mapping[str, Any]) -> str:
    """Bits per byte of every model on every domain."""
    models, domains = list(receipt["models"]), list(receipt["domains"])
    table = {(row["model"], row["domain"]): row["bits_per_byte"] for row in receipt["scores"]}
    figure, axes = _figure(height=1.5 + 0.34 * len(domains), legend_rows=1)
    for line, domain in enumerate(domains):
        values = [table[model, domain] for model in models]
        axes.plot([min(values), max(values)], [line, line], color="#bbbbbb", linewidth=1.2, zorder=1)
    for index, model in enumerate(models):
        look = {**_look(index), "linestyle": "none"}
        axes.plot([table[model, domain] for domain in domains], range(len(domains)), label=model, markersize=7, **look)
    axes.set_yticks(range(len(domains)), domains)
    axes.set(xlabel="bits per byte (less is better)", ylim=(len(domains) - 0.5, -0.5))
    axes.legend(ncols=len(models), loc="lower left", bbox_to_anchor=(-0.12, 1.0), borderaxespad=0.2)
    return svg(figure)


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def _figure(*, height: float = HEIGHT, legend_rows: int = 0) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, height + 0.22 * legend_rows)
    return figure, figure.subplots()
