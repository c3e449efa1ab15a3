"""The text: documents, tokens and bytes of every domain, and where the filters' audit lies."""

from __future__ import annotations

from prismoe.report.page import Block, Findings, Links, Section, Table, Text
from prismoe.views import summary

__all__ = ["PLACE", "section"]

PLACE = 75
AUDIT = "sift/audit.html"


def section(found: Findings) -> Section | None:
    """Of the stages `sift` and `prepare`."""
    receipts = found.receipts
    if "prepare" not in receipts:
        return None
    rows = []
    for row in receipts["prepare"]["domains"]:
        for split in ("train", "heldout"):
            counts = row["splits"][split]
            cells = [f"{counts[key]:,}" for key in ("num_documents", "num_tokens", "num_bytes")]
            rows.append([row["name"], split, *cells, f"{counts['num_bytes'] / max(counts['num_tokens'], 1):.2f}"])
    heads = ["domain", "split", "documents", "tokens", "bytes", "bytes per token"]
    blocks: list[Block] = [
        Text(summary(name, receipts[name]) + ".") for name in ("sift", "prepare") if name in receipts
    ]
    if (found.folder / AUDIT).is_file():
        blocks.append(Links([("What was dropped, and documents to read", AUDIT)]))
    return Section("data", "Data", [*blocks, Table(heads, rows, left=(1,))])
