"""The figures of a report as PNG files for slides, in a folder beside the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from prismoe.folder import write_atomic
from prismoe.report.drawing import DPI, Drawn, drawn_here
from prismoe.report.page import Figure, Links, Section, Text
from prismoe.room import unwritten

__all__ = ["FOLDER", "write_pictures"]

FOLDER = "figures"


def write_pictures(run_folder: Path, drawn: Mapping[Figure, Drawn]) -> Section | None:
    """Write RUN/figures/NAME.png for every figure, and list them; what an earlier page had and this has not goes.

    Raises:
        ResourceError: the folder cannot be written.
    """
    folder, names = run_folder / FOLDER, {f"{figure.name}.png" for figure in drawn}
    for path in folder.glob("*.png"):
        if path.name not in names and drawn_here(path):
            path.unlink()
    if not drawn:
        return None
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritten(folder, error, what="cannot make the folder") from error
    places = []
    for figure, picture in drawn.items():
        path = folder / f"{figure.name}.png"
        write_atomic(path, picture.png)
        places.append((f"{figure.caption} ({picture.width} × {picture.height})", f"{FOLDER}/{path.name}"))
    words = f"Every figure of this page as a PNG file, {DPI} dots an inch on white."
    return Section("pictures", "Figures for slides", [Text(words), Links(places)])
