"""What was found about single experts, for the screen: how alike they are, and what removing some came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from prismoe.console import Screen, bytes_text, count_text
from prismoe.routing.likeness import DUPLICATE, Similarity

__all__ = ["show_pruned", "show_similarity"]

MOST_NAMED = 6


def show_similarity(screen: Screen, found: Similarity) -> None:
    """A row for each layer: means over every two experts, the most alike, and what else was measured."""
    screen.title("similarity")
    count = found.num_experts
    screen.line(f"{count} experts in {len(found.layers)} layers of {found.provenance['model']['folder']}")
    apart = ~np.eye(count, dtype=bool)
    heads, columns = ["\nlayer"], [[str(layer) for layer in found.layers]]

    def add(group: str, name: str, values: Any) -> None:
        heads.append(f"{group}\n{name}")
        columns.append([_number(float(value)) for value in values])

    if count > 1:
        for group, array_LEE in (("expert · expert", found.cosine_LEE), ("neurons matched", found.matched_LEE)):
            add(group, "mean", array_LEE[:, apart].mean(axis=1))
            add("", "most", array_LEE[:, apart].max(axis=1))
    if found.dense_LE is not None:
        add("expert · dense", "mean", found.dense_LE.mean(axis=1))
        add("", "least", found.dense_LE.min(axis=1))
    if found.drift_LE is not None and found.router_drift_L is not None:
        add("moved by", "mean", found.drift_LE.mean(axis=1))
        add("", "most", found.drift_LE.max(axis=1))
        add("router", "moved by", found.router_drift_L)
    screen.table(heads, list(zip(*columns, strict=True)))
    for name, what in (("dense", "dense"), ("before", "moved since")):
        if found.provenance[name] is not None:
            screen.line(f"{what}: {found.provenance[name]['folder']}", style="dim")
    pairs = [f"{row.first} and {row.second} of layer {row.layer}" for row in found.duplicates]
    named = "; ".join(pairs[:MOST_NAMED]) + (f"; {len(pairs) - MOST_NAMED} more" if len(pairs) > MOST_NAMED else "")
    screen.line(f"duplicates (cosine above {DUPLICATE}): {named or 'none'}")


def show_pruned(screen: Screen, receipt: Mapping[str, Any]) -> None:
    """What stayed, what it cost, and the proof."""
    screen.title("prune-experts")
    kind, before, after = (receipt[key] for key in ("model_type", "num_experts_before", "num_experts"))
    what = f"{kind}: {before} → {after} experts a layer by {receipt['criterion']}, top-{receipt['top_k']}"
    screen.line(f"{what}, {bytes_text(receipt['total_bytes'])}, {receipt['state']}")
    saved = receipt["parameters_saved"]
    facts = {
        "folder": receipt["out"],
        "parameters": f"{count_text(receipt['parameters_before'])} → {count_text(receipt['parameters'])}, "
        f"{count_text(saved)} saved ({100 * saved / receipt['parameters_before']:.1f} %)",
        "routing that went to them": f"{100 * receipt['removed_share']:.1f} %",
    }
    if (proof := receipt["proof"]) is not None:
        tied = f", {proof['ties']} ties left out" if proof["ties"] else ""
        facts["the whole model with them masked"] = (
            f"{proof['ffn']:.1e} away in layer {proof['worst']} (limit {proof['limit']:.0e}), "
            f"{proof['num_tokens']} tokens{tied}"
        )
    screen.pairs(facts)
    screen.table(
        ["layer", "removed", "their routing"],
        [
            [str(row["layer"]), " ".join(map(str, row["removed"])), f"{100 * row['removed_share']:.1f} %"]
            for row in receipt["layers"]
        ],
        justify="llr",
    )
    if receipt["perplexity"]:
        shares = receipt["removed_share_of"]
        screen.table(
            ["domain", "their routing", "perplexity before", "after", "change"],
            [
                [
                    name,
                    f"{100 * shares[name]:.1f} %" if name in shares else "",
                    f"{row['before']:,.2f}",
                    f"{row['after']:,.2f}",
                    f"{100 * (row['after'] / row['before'] - 1):+.1f} %",
                ]
                for name, row in receipt["perplexity"].items()
            ],
        )


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"
