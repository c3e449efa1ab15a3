"""What a page is made of: sections of texts, tables and figures, which are drawn for the page and for slides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.train.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from prismoe.routing.record import RoutingTrace

__all__ = ["Code", "Figure", "Findings", "Links", "Panel", "Quote", "Section", "Table", "Text"]

WIDTH, HEIGHT = 4.8, 3.0  # of a panel, inches: narrow, so that letters stay readable on a phone


@dataclass(frozen=True)
class Text:
    """A paragraph. `look` is "", "soft" or "bad"."""

    words: str
    look: str = ""
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class Quote:
    """A word in its surroundings, for a cell of a table."""

    before: str
    word: str
    after: str


@dataclass(frozen=True)
class Table:
    """`left` are the columns of text; the first column is the head of its row."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str | Quote]]
    left: Sequence[int] = ()
    caption: str = ""
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Code:
    """Text as it stands."""

    words: str
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Links:
    """Words, and a place beside the page."""

    places: Sequence[tuple[str, str]]
    kind: str = field(default="links", init=False)


@dataclass(frozen=True)
class Panel:
    """One pair of axes, inches. `shows` is what somebody is told who cannot see it. `margins` left, right, below and
    above the axes are found by measuring every word where they are not given, which takes longer than drawing.
    """

    draw: Callable[[Axes], None]
    shows: str
    title: str = ""
    width: float = WIDTH
    height: float = HEIGHT
    margins: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class Figure:
    """Panels under one caption; `about` says what exactly is shown. `name` is also that of its PNG file."""

    name: str
    caption: str
    panels: Sequence[Panel]
    about: str = ""
    kind: str = field(default="figure", init=False)


Block = Text | Table | Code | Links | Figure


@dataclass(frozen=True)
class Section:
    """One part of the page."""

    name: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Findings:
    """A run folder, as far as it has come: receipts and seconds by stage, and the files that sections read."""

    folder: Path
    receipts: Mapping[str, Any]
    seconds: Mapping[str, float]

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The lines of the training log; of a run that is still training those so far."""
        return self._lines("train/metrics.jsonl")

    @cached_property
    def timing(self) -> list[dict[str, Any]]:
        """What the clock said of each step."""
        return self._lines("train/timing.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == kind]

    @cached_property
    def trace(self) -> RoutingTrace | None:
        """What the routers did with text, where that was traced.

        Raises:
            InputError: the file is damaged.
        """
        from prismoe.routing.record import FILE, RoutingTrace

        path = self.folder / "trace" / FILE
        return RoutingTrace.open(path) if path.is_file() else None

    def _lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return read_metrics(path) if path.is_file() else []
