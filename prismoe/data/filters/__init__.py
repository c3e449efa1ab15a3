"""Filters of documents before they are tokenised: one file, one filter; its `open_scorer(*, …)` has its own arguments.

`fingerprint(arguments)` beside it changes with whatever can change a score. A file may also hold
- `DROP`: the share of a domain that goes when the config does not say; a file without it has a fixed threshold,
- `SCORE`: what a graded score is, in words, for the audit,
- `learn(arguments, texts, folder) -> arguments`: called once, before the first score, with a way to read the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

__all__ = ["WEB_DOMAINS", "FilterSpec", "Scorer"]

WEB_DOMAINS = ("commoncrawl", "c4")
"""The domains that LLaMA-MoE filters (section 5.1), and the default here."""


class Scorer(Protocol):
    """Gives every text a number, higher is better text.

    `reasons` is empty for a graded score. A rule set gives 1 to what passes and otherwise -i, where `reasons[i]` is
    the first rule that the text breaks.
    """

    reasons: tuple[str, ...]

    def score(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """[N] float64, one for each of the texts, none of which is empty."""
        ...


@dataclass(frozen=True)
class FilterSpec:
    """One filter of a run: which, the share of documents it drops in each domain, where, and its own arguments.

    `domains` are names of domains or "all"; the default is those of `WEB_DOMAINS` that the run has.
    """

    name: str
    drop: Annotated[float, Field(gt=0, lt=1)] | None = None
    domains: str | list[str] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
