"""What instruction tuning did, for the screen: what was read, who trained, and the losses before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismoe.console import Screen, bytes_text, count_text

__all__ = ["show_tune", "tune_line"]


def tune_line(receipt: Mapping[str, Any]) -> str:
    """In one line."""
    size = f"{receipt['rows']:,} rows, {count_text(receipt['tokens_per_epoch'])} tokens an epoch"
    size += f", {100 * receipt['supervised_share']:.1f} % supervised, {receipt['steps']} steps"
    if receipt["state"] == "checked":
        return f"{size}; about {bytes_text(receipt['memory_bytes'])} of memory without activations"
    before, after = receipt["heldout_before"]["loss"], receipt["heldout_after"]["loss"]
    rate = f", {count_text(receipt['tokens_per_second'])} tokens/s" if receipt["tokens_per_second"] else ""
    return f"{size}: held-out loss {before:.3f} → {after:.3f}{rate}"


def show_tune(screen: Screen, receipt: Mapping[str, Any]) -> None:
    """In full."""
    _show_text(screen, receipt["text"])
    if receipt["state"] == "checked":
        return
    if receipt["roles"]:
        screen.title("who trains")
        rows = []
        for row in receipt["roles"]:
            norm = "" if row["gradient_norm"] is None else f"{row['gradient_norm']:.3g}"
            rows.append([row["role"], count_text(row["parameters"]), count_text(row["trainable"]), norm])
        screen.table(["role", "parameters", "trained", "gradient after the first step"], rows)
    before, after = receipt["heldout_before"], receipt["heldout_after"]
    screen.title(f"{after['conversations']} held-out conversations, {after['tokens']:,} supervised tokens")
    rows = [["loss", *(_loss(found) for found in (before, after))]]
    if receipt["router"]:
        rows.append(["busiest expert over mean", *(f"{max(found['max_over_mean']):.2f}" for found in (before, after))])
        rows.append(["idle experts", *(str(found["idle"]) for found in (before, after))])
    screen.table(["", "before", "after"], rows)
    facts = {"model": receipt["model"]}
    if receipt["router"]:
        facts["router policy"] = receipt["router"]
    if merged := receipt["merged"]:
        changes = [value for layer in merged["change"] for value in layer]
        facts["merged"] = f"logits off by {merged['logits']:.0e} deviations"
        if changes:
            facts["change of an expert"] = f"{min(changes):.2g} to {max(changes):.2g} of its weights"
    if receipt["resumed_from"]:
        facts["resumed from step"] = str(receipt["resumed_from"])
    screen.pairs(facts)


def _loss(found: Mapping[str, Any]) -> str:
    error = found["standard_error"]
    return f"{found['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _show_text(screen: Screen, text: Mapping[str, Any]) -> None:
    rows = []
    for file in text["files"]:
        counts = [file[key] for key in ("rows", "conversations", "heldout", "truncated")]
        share = f"{100 * file['supervised_share']:.1f} %"
        ends = f"{file['end_of_turn']:,} of {file['answers']:,}"
        rows.append([file["file"], file["form"], *(f"{count:,}" for count in counts), share, ends])
    heads = ["file", "form", "rows", "conversations", "held out", "cut", "supervised", "ends of turn learned"]
    screen.title(f"conversations (template {text['template']})")
    screen.table(heads, rows, justify="llrrrrrr")
    refused = [
        [reason, f"{count:,}", file["first"][reason]]
        for file in text["files"]
        for reason, count in file["refused"].items()
    ]
    if refused:
        screen.table(["refused because", "rows", "first"], refused, justify="lrl")
