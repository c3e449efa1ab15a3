"""Versions and machine: enough to tell why two runs differ."""

from __future__ import annotations

import os

from prismoe.doctor import VARIABLES, system
from prismoe.folder import Manifest, versions
from prismoe.report.page import Block, Findings, Section, Table, Text

__all__ = ["PLACE", "section"]

PLACE = 85
SETTINGS = ("device", "precision", "threads", "processes", "replicate", "expert_parallel")


def section(found: Findings) -> Section:
    """Of the machine that writes the report, and beside it what the training was done with."""
    here = versions()
    facts = {name: value for name, value in system().items() if name != "python"}
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    rows = [[name, value] for name, value in facts.items()]
    blocks: list[Block] = [Table(["", "machine that wrote this page"], rows, left=(1,))]
    trained = Manifest.read(found.folder / "train") if "pretrain" in found.receipts else None
    there = trained.versions if trained else {}
    heads = ["", "this page", *(["training"] if trained else [])]
    names = dict.fromkeys([*here, *there])
    rows = [[name, here.get(name, ""), *([there.get(name, "")] if trained else [])] for name in names]
    blocks.insert(0, Table(heads, rows, left=(1, 2), caption="versions"))
    if trained:
        if changed := [name for name in names if here.get(name) != there.get(name)]:
            blocks.insert(0, Text(f"Trained with other versions of {', '.join(changed)}."))
        settings = trained.config["pretrain"]
        rows = [[name.replace("_", " "), str(settings[name])] for name in SETTINGS if name in settings]
        if way := found.receipts["pretrain"].get("runtime"):
            rows.append(["experts", str(way["experts"])])
        if most := max((row.get("memory_bytes") or 0 for row in found.timing), default=0):
            rows.append(["memory at most", f"{most / 1e9:.2f} GB"])
        blocks.append(Table(["", ""], rows, left=(1,), caption="training"))
    return Section("machine", "Versions and machine", blocks)
