"""A figure as SVG for the page, one element a panel, and as one PNG for slides. Both come of one layout."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismoe.report.page import Figure, Panel
from prismoe.report.style import legend_rows, new_figure, styled

__all__ = ["DPI", "Drawn", "draw", "drawn_here"]

DPI = 200  # of the PNG files, on white
COLUMNS = 4  # panels beside each other on a slide
MAKER = "prismoe report"
HEAD = 0.35  # inches of a slide for the caption
FONT = "'DejaVu Sans'"  # what words are measured with, and what readers have who have not got it
FONTS = f"{FONT}, Verdana, Arial"


@dataclass(frozen=True)
class Drawn:
    """`svgs`: an element for each panel. `png`: all of them under the caption, `width` × `height` dots."""

    svgs: tuple[str, ...]
    png: bytes
    width: int
    height: int


@styled
def draw(figures: Sequence[Figure]) -> list[Drawn]:
    """Draw every panel once on each kind of canvas."""
    return [_draw(figure) for figure in figures]


def _draw(figure: Figure) -> Drawn:
    svgs, pictures = [], []
    for index, panel in enumerate(figure.panels):
        made = _made(panel)
        pictures.append(_pixels(made))
        # The words have found their places, which takes longer than drawing: they stay there.
        made.set_layout_engine("none")
        svgs.append(_svg(made, name=f"{figure.name}-{index}"))
    whole = _side_by_side(figure.caption, pictures)
    return Drawn(tuple(svgs), _png(whole), width=whole.shape[1], height=whole.shape[0])


def _made(panel: Panel) -> Any:
    """The panel as a matplotlib figure; what has no margins yet gets them when it is first drawn."""
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
        rows = legend_rows(axes)  # they stand between axes and title
        axes.set_title(panel.title, pad=24 + 15 * (rows - 1) if rows else 6)
    return figure


def _svg(figure: Any, *, name: str) -> str:
    """An `<svg>` element that grows and shrinks with the page; its ids begin with `name`."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    figure.set_facecolor("none")
    # Not `savefig`, which draws everything one more time to find out how much room it takes.
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(FONT, FONTS)
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
    whole[:head] = _words(caption, whole.shape[1], head)
    for index, picture in enumerate(pictures):
        top, left = head + height * (index // columns), width * (index % columns)
        whole[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return whole


def _words(text: str, width: int, height: int) -> Any:
    """Bytes [height, width, 3] with a line of words in the middle."""
    import numpy as np
    from matplotlib.font_manager import findfont
    from PIL import Image, ImageDraw, ImageFont

    size = min(11.0, 0.92 * width / DPI * 72 / (0.55 * len(text)))  # a letter is half as wide as high
    picture = Image.new("RGB", (width, height), "white")
    font = ImageFont.truetype(findfont("DejaVu Sans"), size * DPI / 72)
    ImageDraw.Draw(picture).text((width / 2, 0.65 * height), text, "black", font, anchor="mm")
    return np.asarray(picture)


def drawn_here(path: Path) -> bool:
    """Whether a PNG file is one of ours; False for what is no picture."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == MAKER
    except OSError:
        return False


def _png(pixels: Any) -> bytes:
    from PIL import Image, PngImagePlugin  # matplotlib stands on it

    buffer, mark = io.BytesIO(), PngImagePlugin.PngInfo()
    mark.add_text("Software", MAKER)
    Image.fromarray(pixels).save(buffer, format="png", dpi=(DPI, DPI), pnginfo=mark)
    return buffer.getvalue()
