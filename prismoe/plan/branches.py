"""A plan's branches by name: where they were when it was made, and which of them are one checkpoint."""

from __future__ import annotations

from prismoe.plan import Plan

__all__ = ["alike_branches", "branch_names"]


def branch_names(plan: Plan) -> tuple[str, ...]:
    """The folder or hub name of each branch, as it was given."""
    return tuple(map(str, plan.origin.arguments.get("branches", ())))[: len(plan.branches)]


def alike_branches(plan: Plan) -> list[str]:
    """A line for each branch that is the base or an earlier branch: experts that start equal, which few would mean."""
    first = {plan.origin.source: "the base"}
    told = []
    for number, (name, fingerprint) in enumerate(zip(branch_names(plan), plan.branches, strict=True), start=1):
        if fingerprint in first:
            told.append(f"branch {number} ({name}) is the same checkpoint as {first[fingerprint]}")
        first.setdefault(fingerprint, f"branch {number}")
    return told
