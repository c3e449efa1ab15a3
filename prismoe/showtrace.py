"""What a trace found, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismoe.console import Screen, count_text

__all__ = ["show_trace", "trace_line"]

Receipt = Mapping[str, Any]
LAYERS = 40  # of a deep model the table shows so many, evenly spaced
_COLUMNS = {
    "entropy": ("entropy\n/ ln E", "{:.3f}"),
    "cv_squared": ("CV² of\nload", "{:.3f}"),
    "load_variance": ("variance\n·10⁴", "{:.2f}"),
    "mutual_information": ("domain\nbits", "{:.4f}"),
    "norm": ("‖output‖\n", "{:.2f}"),
    "moved": ("load\nmoved", "{:.1%}"),
}


def trace_line(receipt: Receipt) -> str:
    """One line."""
    tokens = sum(row["tokens"] for row in receipt["domains"])
    kinds = [row["kind"] for row in receipt["domains"]]
    text = f"{kinds.count('train')} domains" + (f" and {n} benchmarks" if (n := kinds.count("benchmark")) else "")
    size = f"{len(receipt['per_layer'])} routers of {receipt['num_experts']} experts, top-{receipt['top_k']}"
    dead = sum(len(row["domains"]) == kinds.count("train") for row in receipt["dead"])
    return f"{size}, on {count_text(tokens)} tokens of {text}; {dead or 'no'} dead expert{'s' * (dead != 1)}"


def show_trace(screen: Screen, receipt: Receipt) -> None:
    """Sentences, layers, and the distances between domains."""
    for sentence in receipt["sentences"]:
        screen.line(f"• {sentence}")
    rows = receipt["per_layer"]
    names = [name for name in _COLUMNS if name in rows[0]]
    shown = rows if len(rows) <= LAYERS else [rows[i * len(rows) // LAYERS] for i in range(LAYERS)]
    dead, dominant = ([row["layer"] for row in receipt[what]] for what in ("dead", "dominant"))
    screen.title("layers (means over the training domains)")
    screen.table(
        ["layer\n", *(_COLUMNS[name][0] for name in names), "dead or\ndominant"],
        [
            [
                str(row["layer"]),
                *(_COLUMNS[name][1].format(row[name] * (1e4 if name == "load_variance" else 1)) for name in names),
                f"{dead.count(row['layer'])} / {dominant.count(row['layer'])}",
            ]
            for row in shown
        ],
    )
    domains = [row["name"] for row in receipt["domains"]]
    train = [row["name"] for row in receipt["domains"] if row["kind"] == "train"]
    if len(train) > 1:
        screen.title("distance of domains (L2 between load fractions, ·10³: last layer, then mean over layers)")
        for which in ("last", "mean"):
            matrix = receipt["distances"][which]
            cells = [
                [name, *("·" if i == j else f"{1e3 * matrix[i][j]:.0f}" for j in range(len(train)))]
                for i, name in enumerate(domains)
            ]
            screen.table([which, *(name[:9] for name in train)], cells)
    facts = {"model": receipt["model"]["folder"]}
    if receipt["before"] is not None:
        facts["earlier model"] = receipt["before"]["folder"]
    if receipt["out"] is not None:
        facts["written to"] = receipt["out"]
    screen.pairs(facts)
