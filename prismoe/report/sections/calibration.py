"""The calibration: what was measured on which text before the plan was made."""

from __future__ import annotations

from prismoe.console import bytes_text, count_text
from prismoe.report.page import Block, Findings, Section, Table, Text
from prismoe.views import summary

__all__ = ["PLACE", "section"]

PLACE = 70


def section(found: Findings) -> Section | None:
    """Of the stage `calibrate`."""
    receipt = found.receipts.get("calibrate")
    if receipt is None:
        return None
    blocks: list[Block] = [Text(summary("calibrate", receipt) + ".")]
    facts = {
        "layers": str(receipt["num_layers"]),
        "sequences": f"{receipt['num_sequences']:,}",
        "tokens": count_text(receipt["num_tokens"]),
        "on disk": bytes_text(receipt["disk_bytes"]),
    }
    blocks.append(Table(["", ""], [[name, value] for name, value in facts.items()]))
    if receipt["num_clusters"] > 1 and receipt["cluster_domains"]:
        rows = [
            [str(cluster), *(f"{n:,}" for n in counts)] for cluster, counts in enumerate(receipt["cluster_domains"])
        ]
        caption = "sequences of each domain in each cluster of text"
        blocks.append(Table(["cluster", *receipt["domains"]], rows, caption=caption))
    return Section("calibration", "Calibration", blocks)
