"""Experts that work together: how often two share a token, over what their loads alone would give."""

from __future__ import annotations

from typing import Any

import numpy as np

from prismoe.report.heat import pair_panel, spread
from prismoe.report.page import Figure, Findings, Section, Table

__all__ = ["PLACE", "section"]

PLACE = 56
MOST_PAIRS = 8


def section(found: Findings) -> Section | None:
    """Of a routing trace in which a token has more than one expert."""
    trace = found.trace
    if trace is None or trace.top_k < 2:
        return None
    from prismoe.routing.metrics import coactivation_lift

    lift_LEE = coactivation_lift(trace)
    if not np.isfinite(lift_LEE).any():
        return None
    chosen = spread(len(trace.layers))
    top = max(2.0, float(np.nanmax(lift_LEE[chosen])))
    panels = []
    for index in chosen:
        layer, lift_EE = trace.layers[index], lift_LEE[index]
        a, b = np.unravel_index(int(np.nanargmax(lift_EE)), lift_EE.shape) if np.isfinite(lift_EE).any() else (0, 0)
        shows = f"Layer {layer}: most often together {a} and {b}, {lift_EE[a, b]:.1f} times what loads alone give"
        panels.append(pair_panel(lift_EE, layer=layer, top=top, label="× expected", shows=shows))
    about = (
        "Tokens that two experts share, over those expected from their loads if experts were drawn without regard to "
        "each other: 1 is independence. The diagonal, and experts without a token, are left dark. "
        "Definitions: docs/routing.md."
    )
    figure = Figure("coactivation", "Experts that are chosen together", panels, about)
    return Section(
        "pairs", "Experts that work together", [figure, _table(trace.layers, trace.coactivation_LEE, lift_LEE)]
    )


def _table(layers: tuple[int, ...], together_LEE: Any, lift_LEE: Any) -> Table:
    """The pairs with the most tokens over expectation, of all layers."""
    upper = np.triu(np.ones(lift_LEE.shape[1:], bool), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = together_LEE / lift_LEE
        surplus = np.where(upper & np.isfinite(expected), (together_LEE - expected) / np.sqrt(expected), -np.inf)
    rows = []
    for flat in np.argsort(-surplus, axis=None, kind="stable")[:MOST_PAIRS]:
        layer, a, b = (int(part) for part in np.unravel_index(int(flat), surplus.shape))
        if surplus[layer, a, b] > 0:
            rows.append(
                [str(layers[layer]), f"{a} and {b}", f"{lift_LEE[layer, a, b]:.2f}", f"{together_LEE[layer, a, b]:,}"]
            )
    heads = ["layer", "experts", "× expected", "tokens"]
    return Table(heads, rows, left=(1,), caption="pairs that share most tokens beyond expectation")
