"""What was trained on: the weights of the domains over time, and the mix that was asked for and read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.console import count_text
from prismoe.report.page import Block, Figure, Findings, Panel, Section, Table, Text
from prismoe.report.style import legend_above, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "section"]

PLACE = 32


def section(found: Findings) -> Section | None:
    """Of the stage `pretrain`, or of the log of one that is not finished."""
    receipt, blocks = found.receipts.get("pretrain"), list[Block]()
    last = max((line["step"] for line in found.log), default=0)
    history = _history(found)
    if len(history) > 1:
        end = ", ".join(f"{name} {weight:.2f}" for name, weight in history[-1][1].items())
        panel = Panel(partial(_draw, history=history, last=last), f"Domain weights at the end: {end}", height=3.4)
        about = "The share of sequences that is drawn from each domain. A dynamic rule moves it by held-out losses."
        blocks.append(Figure("domain_weights", "Domain weights over time", [panel], about))
    if receipt is not None:
        rows = [_row(share) for share in receipt["mixture"]]
        heads = ["domain", "requested", "achieved", "tokens", "epochs"]
        blocks.append(Table(heads, rows, caption="what was trained on"))
        if len(history) > 1:
            moves = len(history) - 1
            blocks.insert(0, Text(f"Mixing rule {receipt['rule']}: weights moved {moves} time{'s' * (moves > 1)}."))
    return Section("mixture", "Data mix", blocks) if blocks else None


def _history(found: Findings) -> list[tuple[int, Mapping[str, float]]]:
    """(first step, weights) of every setting of the weights."""
    moved = found.events("mixing")
    if not moved:
        return []
    return [(0, moved[0]["before"]), *((line["step"], line["after"]) for line in moved)]


def _row(share: Mapping[str, Any]) -> list[str]:
    shares = [f"{100 * share[key]:.1f} %" for key in ("requested", "achieved")]
    return [share["name"], *shares, count_text(share["tokens"]), f"{share['epochs']:.2f}"]


def _draw(axes: Axes, *, history: Sequence[tuple[int, Mapping[str, float]]], last: int) -> None:
    starts = [step for step, _ in history]
    for index, name in enumerate(history[0][1]):
        weights = [weights[name] for _, weights in history]
        line = {"markersize": 4, "linewidth": 1.4, **look(index)}
        axes.plot([*starts, last], [*weights, weights[-1]], drawstyle="steps-post", label=name, **line)
    axes.set(xlabel="step", ylabel="weight", ylim=(0, None))
    legend_above(axes)
