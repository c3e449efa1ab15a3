"""How long work reports itself: a plain function, so that no module depends on a terminal."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "quiet"]

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total); the unit of done and total is named in `what` or obvious from it."""


def quiet(what: str, done: int, total: int) -> None:
    """Report nothing."""
