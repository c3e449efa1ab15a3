"""What every figure of ours has in common: colours that everyone tells apart, letters, and how it becomes SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "new_figure", "number_cells", "styled", "svg"]

# Okabe and Ito's eight, told apart with every common colour blindness; markers repeat the distinction without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
MARKERS = "osD^vPX*"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # the first is the one that text is measured with
    "font.size": 10.0,
    "svg.fonttype": "none",  # letters stay letters: selectable, searchable, small
    "svg.hashsalt": "prismoe",  # equal figures are equal bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
}

Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """Draw under our style, whatever the machine's matplotlib is set to."""

    @wraps(draw)
    def drawn(*arguments: Any, **options: Any) -> Any:
        import matplotlib as mpl

        with mpl.rc_context({**mpl.rcParamsDefault, **STYLE}):
            return draw(*arguments, **options)

    return cast(Draw, drawn)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, inches."""
    # Figure without pyplot: no window system, no global state, safe in a thread.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def number_cells(axes: Axes, grid: Any, *, top: float, text: Any = None, form: str = ".1f", size: float = 7.0) -> None:
    """Write into the cells of a mesh (cividis from 0 to `top`) its numbers, or those of `text`, of the same shape."""
    numbers = grid if text is None else text
    for place in _places(grid.shape):
        colour = "white" if grid[place] < 0.55 * top else "black"
        at: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": colour}
        axes.text(place[1] + 0.5, place[0] + 0.5, format(numbers[place], form), **at)


def _places(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(shape[0]) for column in range(shape[1]))


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element that grows and shrinks with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
