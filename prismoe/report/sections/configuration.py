"""Every config of the run, as it can be run again."""

from __future__ import annotations

from prismoe.report.page import Code, Findings, Section
from prismoe.state import CONFIG

__all__ = ["PLACE", "section"]

PLACE = 88


def section(found: Findings) -> Section | None:
    """Of the run's own YAML, defaults included."""
    path = found.folder / CONFIG
    return Section("config", "Configuration", [Code(path.read_text(encoding="utf-8"))]) if path.is_file() else None
