"""How long work reports itself: a plain function, so that no module depends on a terminal."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Progress", "quiet"]

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total); the unit of done and total is named in `what` or obvious from it.

`what` may end in a changing detail after ": " ("train step: loss 2.31"); the part before it names the work, and
one name is one bar. `total` 0 means that the end is not known.
"""


def quiet(what: str, done: int, total: int) -> None:
    """Report nothing."""
