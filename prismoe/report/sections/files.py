"""The files of the converted model, so that two runs can be told to have the same bytes."""

from __future__ import annotations

from prismoe.report.page import Findings, Section, Table

__all__ = ["PLACE", "section"]

PLACE = 90


def section(found: Findings) -> Section | None:
    """Of the stage `convert`."""
    if "convert" not in found.receipts:
        return None
    files = found.receipts["convert"]["files"]
    rows = [[name, f"{row['bytes']:,}", row["sha256"]] for name, row in files.items()]
    return Section("files", "Files of the converted model", [Table(["file", "bytes", "sha256"], rows, left=(2,))])
