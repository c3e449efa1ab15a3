"""One line of the table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Outcome"]

SHOWN = 5


@dataclass(frozen=True)
class Outcome:
    """`held` of `tried` cases did what `what` says; `faults` are the first that did not, each with how to repeat it.

    `goal` is how many cases the promise speaks of, `note` what a reader should know beside the number.
    """

    what: str
    tried: int
    held: int
    goal: int
    faults: tuple[str, ...] = ()
    note: str = ""

    @property
    def met(self) -> bool:
        return self.held == self.tried >= self.goal

    @classmethod
    def of(cls, what: str, cases: dict[str, str | None], *, goal: int, note: str = "") -> Outcome:
        """Of named cases: None where the promise held, else what was found."""
        faults = tuple(f"{name}: {found}" for name, found in cases.items() if found is not None)
        return cls(what, len(cases), len(cases) - len(faults), goal, faults[:SHOWN], note)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}
