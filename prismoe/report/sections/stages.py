"""What was done, in order, and how long it took."""

from __future__ import annotations

from prismoe.console import seconds_text
from prismoe.report.page import Findings, Section, Table
from prismoe.views import summary

__all__ = ["PLACE", "section"]

PLACE = 80


def section(found: Findings) -> Section:
    """Of every finished stage."""
    receipts = {name: receipt for name, receipt in found.receipts.items() if name != "report"}
    rows = [[name, seconds_text(found.seconds[name]), summary(name, receipt)] for name, receipt in receipts.items()]
    return Section("stages", "Stages", [Table(["stage", "time", "what came of it"], rows, left=(2,))])
