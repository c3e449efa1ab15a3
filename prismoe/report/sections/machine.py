"""Versions and machine: enough to tell why two runs differ."""

from __future__ import annotations

from prismoe.doctor import doctor
from prismoe.folder import versions
from prismoe.report.page import Findings, Section, Table

__all__ = ["PLACE", "section"]

PLACE = 85


def section(found: Findings) -> Section:
    """Of the machine that writes the report."""
    sections = doctor().sections
    facts = {**versions(), **{name: value for name, value in sections["system"].items() if name != "python"}}
    facts |= {name: value for name, value in sections["torch"].items() if name.startswith(("cuda", "accel", "threads"))}
    facts |= {name: value for name, value in sections["environment"].items() if value}
    rows = [[name, value] for name, value in facts.items()]
    return Section("machine", "Versions and machine", [Table(["", ""], rows, left=(1,))])
