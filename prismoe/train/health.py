"""Updates that are not made (a loss or gradient that is not finite, a spike); when the run goes back or gives up."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from prismoe.errors import NumericalError

__all__ = ["Health"]

_WINDOW = 64
_ENOUGH = 16  # norms that must have been seen before one of them can be called a spike


@dataclass
class Health:
    """Judges every step. All of it is training state, so that a resumed run judges alike.

    A step whose loss or gradient norm is not finite, or whose gradient norm is over `spike` times the median of the
    latest 64, changes no weight. After `limit` such steps in a row the run goes back to its last checkpoint and on with
    other text: `passed_over` is the number of batches that it has left out. After `rollbacks` times it gives up.
    """

    spike: float
    limit: int
    rollbacks: int
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    in_a_row: int = 0
    skipped: int = 0
    went_back: int = 0
    passed_over: int = 0

    def judge(self, *, loss: float, norm: float) -> str:
        """What is wrong with a step, empty when nothing is."""
        found = ""
        if not math.isfinite(loss):
            found = f"loss is {loss}"
        elif not math.isfinite(norm):
            found = f"gradient norm is {norm}"
        elif self.spike and len(self.norms) >= _ENOUGH and norm > self.spike * (usual := median(self.norms)):
            found = f"gradient norm {norm:.3g} is {norm / usual:.0f} times the usual {usual:.3g}"
        if found:
            self.in_a_row += 1
            self.skipped += 1
        else:
            self.in_a_row = 0
            self.norms.append(norm)
        return found

    @property
    def must_go_back(self) -> bool:
        return self.in_a_row >= self.limit

    def go_back(self, *, step: int, to: int | None, found: str) -> None:
        """Note that the run goes on from checkpoint `to` (None: there is none) after `step` steps.

        Raises:
            NumericalError: nothing to go back to, or it went back too often.
        """
        if to is None or self.went_back >= self.rollbacks:
            why = "there is no checkpoint to go back to" if to is None else f"it went back {self.went_back} times"
            raise NumericalError(
                f"{found}; {self.in_a_row} steps in a row were left out, and {why}",
                where=f"step {step}",
                needed="a finite number",
                hint="no weight was changed by these steps; lower lr or clip, or save more often",
            )
        self.went_back += 1
        self.in_a_row = 0
        self.passed_over += step - to

    def state(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "norms": list(self.norms),
            "in_a_row": self.in_a_row,
            "skipped": self.skipped,
            "went_back": self.went_back,
            "passed_over": self.passed_over,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.norms.clear()
        self.norms.extend(state["norms"])
        for name in ("in_a_row", "skipped", "went_back", "passed_over"):
            setattr(self, name, int(state[name]))
