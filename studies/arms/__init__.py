"""The questions of the study: a file each, `QUESTION` in it; files are numbered in the order of the paper."""

from __future__ import annotations

from prismoe import registry
from studies.design import Question

__all__ = ["questions"]


def questions() -> list[Question]:
    """All of them, in the order of their files."""
    return [registry.load(__name__, name, where="studies").QUESTION for name in registry.names(__name__)]
