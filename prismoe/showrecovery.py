"""What a recovery did to each layer, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismoe.console import Screen, bytes_text, count_text

__all__ = ["recovery_line", "show_recovery"]

Receipt = Mapping[str, Any]
LAYERS = 40  # of a deep model the table shows so many, evenly spaced


def recovery_line(receipt: Receipt) -> str:
    """One line."""
    if missing := receipt.get("not_checked"):
        return f"dry run; not there yet: {', '.join(missing)}"
    text = f"{count_text(receipt['tokens'])} tokens, {count_text(receipt['held_tokens'])} of them to measure on"
    what = f"{receipt['target']}, {receipt['num_experts']} experts: {receipt['train']} on {text}"
    rows = receipt["layers"]
    if not rows:
        needs = f"{bytes_text(receipt['memory_bytes'])} of memory, {bytes_text(receipt['disk_bytes'])} of disk"
        return f"{what}; at most {needs}"
    before, after = (sum(row[name] for row in rows) / len(rows) for name in ("before", "after"))
    return f"{what}; mean error of {len(rows)} layers {before:.3f} → {after:.3f}"


def show_recovery(screen: Screen, receipt: Receipt) -> None:
    """A row for each layer."""
    rows = receipt.get("layers", ())
    if not rows:
        return
    screen.pairs({"folder": receipt["out"], "experts a token": _counts(receipt)})
    shown = rows if len(rows) <= LAYERS else [rows[i * len(rows) // LAYERS] for i in range(LAYERS)]
    screen.title("relative error of a layer's FFN output, on text that was kept back")
    screen.table(
        ["layer\n", "error\nbefore", "\nafter", "K\n", "error\nK - 1", "\nK + 1", "router's mass\nin K", "load\nmost"],
        [
            [
                str(row["layer"]),
                f"{row['before']:.4f}",
                f"{row['after']:.4f}" if row["learned"] else f"{row['after']:.4f} (stays)",
                str(row["top_k"]),
                _at(row["errors"], row["top_k"] - 1),
                _at(row["errors"], row["top_k"] + 1),
                f"{row['mass'][row['top_k'] - 1]:.1%}",
                f"{max(row['load']) * len(row['load']):.2f}×",
            ]
            for row in shown
        ],
    )


def _at(errors: list[float], k: int) -> str:
    return f"{errors[k - 1]:.4f}" if 1 <= k <= len(errors) else ""


def _counts(receipt: Receipt) -> str:
    chosen = [row["top_k"] for row in receipt["layers"]]
    before = receipt["top_k_before"]
    if len(set(chosen)) > 1:
        return f"{before} → {sum(chosen) / len(chosen):.2f} on the mean, {min(chosen)} to {max(chosen)} by layer"
    return str(before) if chosen[0] == before else f"{before} → {chosen[0]}"
