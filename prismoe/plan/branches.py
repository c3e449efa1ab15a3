"""A plan's branches by name, for receipts: where they were when it was made, and which of them are one checkpoint."""

from __future__ import annotations

from typing import Any

from prismoe.plan import Plan

__all__ = ["alike_branches", "branch_facts"]


def branch_facts(plan: Plan) -> dict[str, Any]:
    """`branches`: name (folder or hub name, as given) and fingerprint of each; `rest`: see `Plan`. JSON-able, and
    empty for a plan of one checkpoint.
    """
    if not plan.branches:
        return {}
    rows = [{"name": str(name), "fingerprint": found} for name, found in zip(_names(plan), plan.branches, strict=True)]
    return {"branches": rows, "rest": list(plan.rest)}


def alike_branches(plan: Plan) -> list[str]:
    """A line for each branch that is the base or an earlier branch: experts that start equal, which few would mean."""
    first = {plan.origin.source: "the base"}
    told = []
    for number, (name, fingerprint) in enumerate(zip(_names(plan), plan.branches, strict=True), start=1):
        if fingerprint in first:
            told.append(f"branch {number} ({name}) is the same checkpoint as {first[fingerprint]}")
        first.setdefault(fingerprint, f"branch {number}")
    return told


def _names(plan: Plan) -> list[Any]:
    """As many as there are branches: a plan that was made by hand may say less about its origin."""
    names = plan.origin.arguments.get("branches")
    return [*(names if isinstance(names, list) else []), *([""] * len(plan.branches))][: len(plan.branches)]
