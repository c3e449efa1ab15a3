"""Experts that were left out: what `prismoe prune-experts` saved, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prismoe.console import count_text
from prismoe.report.page import Block, Findings, Section, Table, Text

__all__ = ["PLACE", "section"]

PLACE = 61


def section(found: Findings) -> Section | None:
    """Of every model in a folder of the run from which experts were taken."""
    from prismoe.routing.choice import RECEIPT

    paths = sorted(found.folder.glob(f"*/{RECEIPT}"))
    blocks = [block for path in paths for block in _told(path)]
    return Section("pruned", "Experts left out", blocks) if blocks else None


def _told(path: Path) -> list[Block]:
    try:
        receipt = json.loads(path.read_bytes())
        return _blocks(path.parent.name, receipt)
    except (ValueError, KeyError, TypeError) as error:
        return [Text(f"{path.parent.name}/{path.name} cannot be read ({error!r}).", "bad")]


def _blocks(name: str, receipt: Mapping[str, Any]) -> list[Block]:
    text = (
        f"{name}: {receipt['num_experts']} of {receipt['num_experts_before']} experts a layer stay, those with the "
        f"largest {receipt['criterion']}. {count_text(receipt['parameters_saved'])} parameters less "
        f"({receipt['parameters']:,} of {receipt['parameters_before']:,}); "
        f"{100 * receipt['removed_share']:.1f} % of the routing went to those that are gone."
    )
    blocks: list[Block] = [Text(text)]
    blocks += [Text(f"Warning: {warning}.", "bad") for warning in receipt["warnings"]]
    layers = [
        [str(row["layer"]), ", ".join(map(str, row["removed"])) or "none", f"{100 * row['removed_share']:.1f} %"]
        for row in receipt["layers"]
    ]
    blocks.append(Table(["layer", "removed", "share of routing"], layers, left=(1,), caption=f"{name}, by layer"))
    domains = []
    for domain, share in receipt["removed_share_of"].items():
        values = receipt["perplexity"].get(domain)
        cells = [f"{values[when]:,.2f}" for when in ("before", "after")] if values else ["", ""]
        domains.append([domain, f"{100 * share:.1f} %", *cells])
    heads = ["domain", "share of routing", "perplexity before", "after"]
    blocks.append(Table(heads, domains, caption=f"{name}, by domain"))
    return blocks
