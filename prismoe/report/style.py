"""What every figure of ours has in common: colours that everyone tells apart, letters, and the marks that recur."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLOURS",
    "GREY",
    "MARKERS",
    "heat_map",
    "legend_above",
    "legend_rows",
    "log_axis",
    "look",
    "name_cells",
    "new_figure",
    "number_cells",
    "reference_line",
    "styled",
    "thinned",
    "whole_numbers",
]

# Okabe and Ito's eight, told apart with every common colour blindness; markers repeat the distinction without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
MARKERS = "osD^vPX*"
GREY = "#555555"
HEAT = "cividis"  # made for colour blindness, and its lightness only grows
LEVELS = 24  # shades of a heat map: cells of one shade are one shape in the page
MOST_TICKS = 12
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib; every further name is looked up for every word
    "font.size": 10.0,
    "svg.fonttype": "none",  # letters stay letters: selectable, searchable, small
    "svg.hashsalt": "prismoe",  # equal figures are equal bytes
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.facecolor": "none",
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # else it is looked for above whatever stands there, by measuring all of it once more
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


def look(index: int) -> dict[str, Any]:
    """Colour and marker of line number `index`."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def thinned(x: Any, y: Any, *, most: int = 500) -> tuple[Any, Any, Any, Any]:
    """(x, mean, lowest, highest) of at most `most` runs of neighbouring points: a long log stays a small page."""
    import numpy as np

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    starts = np.unique(np.linspace(0, len(x), min(most, len(x)), endpoint=False).astype(int))
    counts = np.diff([*starts, len(x)])
    centre, mean = (np.add.reduceat(part, starts) / counts for part in (x, y))
    return centre, mean, np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def log_axis(axes: Axes) -> None:
    """The y axis by powers of ten, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def reference_line(axes: Axes, value: float) -> None:
    """A dashed line across, at what is compared with."""
    axes.axhline(value, color=GREY, linewidth=1.0, linestyle="--")


def legend_above(axes: Axes) -> None:
    """The legend over the axes, where it covers no data."""
    axes.legend(
        ncols=_columns(axes.get_legend_handles_labels()[1]),
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        borderaxespad=0.1,
        columnspacing=1.0,
        handlelength=1.5,
    )


def legend_rows(axes: Axes) -> int:
    """Of the legend that `legend_above` made; 0 without one."""
    labels = [text.get_text() for text in legend.get_texts()] if (legend := axes.get_legend()) else []
    return -(-len(labels) // _columns(labels))


def _columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels), default=0)
    return 4 if longest < 8 else 3 if longest < 14 else 2 if longest < 30 else 1


def heat_map(axes: Axes, grid: Any, *, top: float, label: str, low: float = 0.0) -> None:
    """Cells [rows, columns] from `low` (dark) to `top` (light), the first row at the top, and a bar that says so."""
    import matplotlib as mpl
    import numpy as np
    from matplotlib.collections import PathCollection

    grid = np.asarray(grid, np.float64)
    colours = mpl.colormaps[HEAT].resampled(LEVELS)
    span = top - low if top > low else 1.0
    shades = np.clip(((grid - low) / span * LEVELS).astype(int), 0, LEVELS - 1)
    edge = 0.5 if grid.size <= 600 else 0.2 if grid.size <= 2500 else 0.0
    shown = np.unique(shades)
    cells = [_rectangles(*np.nonzero(shades == shade)[::-1]) for shade in shown]
    # One artist, and limits set below: finding them from every corner takes longer than drawing.
    axes.add_artist(
        PathCollection(cells, facecolors=colours(shown), edgecolors="white" if edge else "face", linewidths=edge or 0.2)
    )
    axes.grid(visible=False)
    axes.set(xlim=(0, grid.shape[1]), ylim=(grid.shape[0], 0))
    wide, high = (
        axes.get_position().width * axes.figure.bbox.width,
        axes.get_position().height * axes.figure.bbox.height,
    )
    bar = axes.inset_axes((1.0 + 0.015 * high / wide, 0.0, 0.05 * high / wide, 1.0))
    # Each shade reaches from its own beginning to the end: between neighbours no line of the ground shows.
    steps = low + span * np.arange(LEVELS) / LEVELS
    parts = [_rectangles(0.0, step, high=low + span - step) for step in steps]
    bar.add_artist(PathCollection(parts, facecolors=colours(range(LEVELS)), linewidths=0.0))
    bar.grid(visible=False)
    bar.yaxis.tick_right()
    bar.yaxis.set_label_position("right")
    bar.spines[:].set_visible(False)
    bar.set(xlim=(0.0, 1.0), ylim=(low, low + span), xticks=(), ylabel=label)


def _rectangles(left: Any, below: Any, *, high: float = 1.0) -> Any:
    """Rectangles as one path."""
    import numpy as np
    from matplotlib.path import Path

    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]) * (1.0, high)
    starts = np.stack([np.atleast_1d(left), np.atleast_1d(below)], 1)
    return Path((starts[:, None, :] + corners).reshape(-1, 2), codes * len(starts))


def name_cells(axes: Axes, columns: Sequence[str], rows: Sequence[str], *, upright: bool = False) -> None:
    """Names along a heat map, some left out where there are many."""
    for side, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        shown = range(0, len(names), -(-len(names) // (MOST_TICKS if side is axes.xaxis else 2 * MOST_TICKS)))
        side.set_ticks([index + 0.5 for index in shown], [names[index] for index in shown])
    axes.tick_params(labelsize=8, length=0, left=False, bottom=False)
    if upright:
        axes.tick_params(axis="x", labelrotation=90)


def number_cells(axes: Axes, grid: Any, *, top: float, text: Any = None, form: str = ".1f", size: float = 7.0) -> None:
    """Write into the cells of a heat map (from 0 to `top`) its numbers, or those of `text`, of the same shape."""
    numbers = grid if text is None else text
    for place in _places(grid.shape):
        colour = "white" if grid[place] < 0.55 * top else "black"
        # Inside its cell it cannot push anything, and measuring hundreds of them takes longer than drawing them.
        at: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": size, "color": colour, "in_layout": False}
        axes.text(place[1] + 0.5, place[0] + 0.5, format(numbers[place], form), **at)


def _places(shape: tuple[int, int]) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(shape[0]) for column in range(shape[1]))
