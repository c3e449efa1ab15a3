"""A figure as SVG for the page, one element a panel, and as one PNG for slides. Both come of one layout."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from typing import Any

from prismoe.report.page import Figure, Panel
from prismoe.report.style import new_figure, styled

__all__ = ["DPI", "Drawn", "draw"]

DPI = 200  # of the PNG files, on white
COLUMNS = 4  # panels beside each other on a slide
HEAD = 0.35  # inches of a slide for the caption


@dataclass(frozen=True)
class Drawn:
    """`svgs`: an element for each panel. `png`: all of them under the caption, `width` × `height` dots."""

    svgs: tuple[str, ...]
    png: bytes
    width: int
    height: int


@styled
def draw(figure: Figure) -> Drawn:
    """Draw every panel once on each kind of canvas."""
    svgs, pictures = [], []
    for index, panel in enumerate(figure.panels):
        drawn = _laid_out(panel)
        svgs.append(_svg(drawn, name=f"{figure.name}-{index}"))
        pictures.append(_pixels(drawn))
    whole = _side_by_side(figure.caption, pictures)
    return Drawn(tuple(svgs), _png(whole), width=whole.shape[1], height=whole.shape[0])


def _laid_out(panel: Panel) -> Any:
    """The panel with everything in its place: finding the place costs more than drawing, so it is done once."""
    figure = new_figure(panel.width, panel.height)
    if panel.margins is None:
        axes = figure.subplots()
    else:
        left, right, below, above = panel.margins
        wide, high = panel.width - left - right, panel.height - below - above
        figure.set_layout_engine("none")
        axes = figure.add_axes((left / panel.width, below / panel.height, wide / panel.width, high / panel.height))
    panel.draw(axes)
    if panel.title:
        axes.set_title(panel.title, pad=24 if axes.get_legend() else 6)
    if panel.margins is None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def _svg(figure: Any, *, name: str) -> str:
    """An `<svg>` element that grows and shrinks with the page; its ids begin with `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    whole = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + _rounded(body)
    # A page holds several drawings: the ids of each are its own.
    whole = re.sub(r'\bid="', f'id="{name}-', whole)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", whole)


def _rounded(text: str) -> str:
    """Coordinates of paths to a hundredth of a point: nobody sees more, and the page is a third smaller."""

    def shorter(path: re.Match[str]) -> str:
        words = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[1]).split()
        return f'd="{" ".join(words)}"'

    return re.sub(r'd="([^"]*)"', shorter, text)


def _pixels(figure: Any) -> Any:
    """Bytes [rows, columns, 3] on white."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    figure.set(dpi=DPI, facecolor="white")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _side_by_side(caption: str, pictures: list[Any]) -> Any:
    """The pictures in rows, under a line of words."""
    import numpy as np

    count = len(pictures)
    columns = min(count, COLUMNS if count > 4 else 3 if count == 3 else 2)
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    head = round(HEAD * DPI)
    whole = np.full((head + height * math.ceil(count / columns), width * columns, 3), 255, np.uint8)
    words = new_figure(whole.shape[1] / DPI, HEAD)
    words.set_layout_engine("none")
    size = min(11.0, 0.92 * whole.shape[1] / DPI * 72 / (0.55 * len(caption)))  # a letter is half as wide as high
    words.text(0.5, 0.35, caption, ha="center", va="center", fontsize=size)
    whole[:head] = _pixels(words)[:head, : whole.shape[1]]
    for index, picture in enumerate(pictures):
        top, left = head + height * (index // columns), width * (index % columns)
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def _png(pixels: Any) -> bytes:
    from PIL import Image  # matplotlib stands on it

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", dpi=(DPI, DPI))
    return buffer.getvalue()
