"""The certificate: what was proved of the converted model, and the size of its FFN output beside the dense one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.report.page import Block, Figure, Findings, Panel, Section, Table, Text
from prismoe.report.style import COLOURS, reference_line, whole_numbers
from prismoe.views import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "section"]

PLACE = 65


def section(found: Findings) -> Section | None:
    """Of the stage `verify`."""
    receipt = found.receipts.get("verify")
    if receipt is None:
        return None
    rows = [
        [
            row["name"],
            "holds" if row["passed"] else "FAILED",
            _small(row["measured"]),
            "" if row["limit"] is None else _small(row["limit"]),
            row["meaning"],
            row["where"],
        ]
        for row in receipt["checks"]
    ]
    text = f"{summary('verify', receipt)}. Stock transformers classes, remote code off; {receipt['input']}."
    blocks: list[Block] = [Text(text)]
    ratios = [row for row in receipt["layers"] if row["kind"] != "dense" and isinstance(row["norm_ratio"], float)]
    if ratios:
        low, high = (pick(row["norm_ratio"] for row in ratios) for pick in (min, max))
        panel = Panel(partial(_draw, rows=ratios), f"Ratio by layer, {low:.2f} to {high:.2f}", height=2.6)
        caption = "Size of the mixture's FFN output by layer (1 is the dense model's)"
        about = (
            "Mean norm of the output of the experts over that of the dense FFN, on the same inputs, before training."
        )
        blocks.append(Figure("norm_ratios", caption, [panel], about))
    blocks.append(Table(["check", "", "measured", "limit", "what", "worst at"], rows, left=(1, 4, 5)))
    return Section("certificate", "Certificate", blocks)


def _small(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.1e}" if number else "0"


def _draw(axes: Axes, *, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.bar([row["layer"] for row in rows], [row["norm_ratio"] for row in rows], color=COLOURS[0], width=0.7)
    reference_line(axes, 1.0)
    axes.set(xlabel="layer", ylabel="‖mixture‖ / ‖dense‖")
    whole_numbers(axes)
