"""The boxes at the top of the page: what a reader in a hurry wants."""

from __future__ import annotations

from dataclasses import dataclass

from prismoe.console import count_text
from prismoe.report.page import Findings

__all__ = ["Number", "numbers"]


@dataclass(frozen=True)
class Number:
    """One box; `state` is "", "good" or "bad"."""

    name: str
    value: str
    more: str = ""
    state: str = ""


def numbers(found: Findings) -> list[Number]:
    """Sizes, the certificate, what was trained, and the mean scores of every model."""
    receipts = found.receipts
    counts = receipts["plan"]["account"]
    boxes = [
        Number("parameters", count_text(counts["total_parameters"]), f"dense {count_text(counts['dense_parameters'])}"),
        Number("active per token", count_text(counts["active_parameters"])),
        Number("FFN active", f"{counts['ffn_active_percent']:.1f} %"),
        Number(
            "FLOPs per token",
            count_text(counts["flops_per_token"]),
            f"dense {count_text(counts['dense_flops_per_token'])}",
        ),
    ]
    if "verify" in receipts:
        passed, count = receipts["verify"]["passed"], len(receipts["verify"]["checks"])
        state, word = ("good", "holds") if passed else ("bad", "FAILED")
        boxes.append(Number("certificate", word, f"{count} checks", state))
    if "pretrain" in receipts:
        boxes.append(Number("trained on", count_text(receipts["pretrain"]["tokens"]), "tokens"))
    scores = receipts["eval"]["scores"] if "eval" in receipts else ()
    for model in dict.fromkeys(row["model"] for row in scores):
        values = [row["bits_per_byte"] for row in scores if row["model"] == model]
        boxes.append(Number(f"bits/byte, {model}", f"{sum(values) / len(values):.3f}", "mean of domains"))
    return boxes
