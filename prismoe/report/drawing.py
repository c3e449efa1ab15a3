"""Figures as SVG for the page, one element a panel, and as one PNG for slides."""

from __future__ import annotations

import io
import math
import re

from prismoe.report.page import Figure, Panel
from prismoe.report.style import new_figure, styled

__all__ = ["DPI", "png", "svg"]

DPI = 200  # of the PNG files, on white
COLUMNS = 4  # panels beside each other on a slide


@styled
def svg(panel: Panel, *, name: str) -> str:
    """A panel as an `<svg>` element that grows and shrinks with the page; its ids begin with `name`."""
    figure = new_figure(panel.width, panel.height)
    axes = figure.subplots()
    panel.draw(axes)
    if panel.title:
        axes.set_title(panel.title, pad=24 if axes.get_legend() else 6)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    whole = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + _rounded(body)
    # A page holds several drawings: the ids of each are its own.
    whole = re.sub(r'\bid="', f'id="{name}-', whole)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", whole)


@styled
def png(figure: Figure) -> bytes:
    """All panels of a figure on white, `DPI` dots an inch, under its caption."""
    count = len(figure.panels)
    columns = min(count, COLUMNS if count > 4 else 3 if count == 3 else 2)
    rows = math.ceil(count / columns)
    width, height = (max(getattr(panel, side) for panel in figure.panels) for side in ("width", "height"))
    drawn = new_figure(width * columns, height * rows + 0.35)
    drawn.suptitle(figure.caption, fontsize=11, wrap=True)
    # Each panel is laid out by itself: what is written around one does not push the others.
    for place, panel in zip(drawn.subfigures(rows, columns, squeeze=False).ravel(), figure.panels, strict=False):
        axes = place.subplots()
        panel.draw(axes)
        if panel.title:
            axes.set_title(panel.title, pad=24 if axes.get_legend() else 6)
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _rounded(text: str) -> str:
    """Coordinates of paths to a hundredth of a point: nobody sees more, and the page is a third smaller."""

    def shorter(path: re.Match[str]) -> str:
        words = re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", path[1]).split()
        return f'd="{" ".join(words)}"'

    return re.sub(r'd="([^"]*)"', shorter, text)
