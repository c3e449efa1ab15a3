"""Routing against depth: specialisation, how decided the routers are, how even the load is, how large the output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.report.page import Block, Figure, Findings, Panel, Section
from prismoe.report.style import COLOURS, legend_above, look, reference_line, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "curves", "section"]

PLACE = 54


def section(found: Findings) -> Section | None:
    """Of a routing trace."""
    trace = found.trace
    if trace is None:
        return None
    from prismoe.routing import metrics

    blocks: list[Block] = []
    several = len(metrics.training_domains(trace)) > 1
    if several:
        variance_L, bits_L = metrics.load_variance(trace), metrics.mutual_information(trace)
        shows = f"Variance of the load, {variance_L[0]:.1e} in the first layer and {variance_L[-1]:.1e} in the last"
        panel = Panel(partial(_one, layers=trace.layers, values_L=variance_L, label="variance"), shows, height=2.6)
        about = (
            "Variance of an expert's share of assignments over the training domains, mean over experts: "
            "0 where every domain is routed alike."
        )
        blocks.append(Figure("load_variance", "Load variance over depth", [panel], about))
        shows = f"Mutual information, {bits_L.min():.3f} to {bits_L.max():.3f} bits"
        panel = Panel(partial(_one, layers=trace.layers, values_L=bits_L, label="bits"), shows, height=2.6)
        about = "What the expert of one assignment tells about the domain of its token, domains being equally likely."
        blocks.append(Figure("specialisation", "Specialisation over depth", [panel], about))
    names = trace.domains
    entropy_GL = metrics.normalised_entropy(trace)
    ends = [float(values_G.mean()) for values_G in (entropy_GL[:, 0], entropy_GL[:, -1])]
    shows = f"Entropy over depth, mean of domains {ends[0]:.2f} in the first layer, {ends[1]:.2f} in the last"
    panel = Panel(
        partial(curves, layers=trace.layers, values_GL=entropy_GL, names=names, label="entropy / ln E"),
        shows,
        height=3.4,
    )
    about = "Mean entropy of the softmax over all experts as a share of its largest: 1 is undecided, 0 certain."
    blocks.append(Figure("routing_entropy", "Routing entropy over depth", [panel], about))
    cv_GL = metrics.cv_squared(trace)
    shows = f"Imbalance over depth, {cv_GL.min():.2f} to {cv_GL.max():.2f}"
    panel = Panel(
        partial(curves, layers=trace.layers, values_GL=cv_GL, names=names, label="CV²", low=0.0), shows, height=3.4
    )
    about = "Variance of the load over its squared mean, over the experts of a layer: 0 is balance."
    blocks.append(Figure("imbalance", "Imbalance of the load over depth", [panel], about))
    if trace.norm_GL.any():
        shows = f"Norm of the mixture's output, {trace.norm_GL.min():.2g} to {trace.norm_GL.max():.2g}"
        panel = Panel(
            partial(curves, layers=trace.layers, values_GL=trace.norm_GL, names=names, label="norm", low=0.0),
            shows,
            height=3.4,
        )
        about = "Mean over tokens of the length of what the experts of a layer add to the residual stream."
        blocks.append(Figure("output_norm", "Size of the mixture's output over depth", [panel], about))
    return Section("depth", "Routing over depth", blocks)


def _one(axes: Axes, *, layers: Sequence[int], values_L: Any, label: str) -> None:
    axes.plot(layers, values_L, color=COLOURS[0], marker="o", markersize=4.5, linewidth=1.5)
    axes.set(xlabel="layer", ylabel=label, ylim=(0, None))
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=False)
    whole_numbers(axes)


def curves(
    axes: Axes, *, layers: Sequence[int], values_GL: Any, names: Sequence[str], label: str, low: float | None = None
) -> None:
    """A line over layers for each text."""
    for index, (name, values_L) in enumerate(zip(names, values_GL, strict=True)):
        style = "-" if index < 8 else "--"
        axes.plot(layers, values_L, label=name, markersize=4, linewidth=1.2, linestyle=style, **look(index))
    axes.set(xlabel="layer", ylabel=label)
    if low is not None:
        axes.set_ylim(low, None)
    elif values_GL.max() <= 1.0 and values_GL.min() > 0.9:
        reference_line(axes, 1.0)
    whole_numbers(axes)
    legend_above(axes)
