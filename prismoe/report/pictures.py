"""The figures of a report as PNG files for slides, in a folder beside the page."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from prismoe.errors import ResourceError
from prismoe.folder import write_atomic
from prismoe.report.page import Figure, Links, Section, Text

__all__ = ["FOLDER", "write_pictures"]

FOLDER = "figures"


def write_pictures(run_folder: Path, figures: Sequence[Figure]) -> Section | None:
    """Write RUN/figures/NAME.png for every figure, and list them.

    Raises:
        ResourceError: the folder cannot be written.
    """
    from prismoe.report.drawing import DPI, png

    folder = run_folder / FOLDER
    if not figures and not folder.is_dir():
        return None
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ResourceError(f"cannot make the folder: {error.strerror}", where=str(folder)) from error
    places = []
    for figure in figures:
        data = png(figure)
        path = folder / f"{figure.name}.png"
        write_atomic(path, data)
        width, height = struct.unpack(">II", data[16:24])  # where every PNG has them
        places.append((f"{figure.caption} ({width} × {height})", f"{FOLDER}/{path.name}"))
    words = f"Every figure of this page as a PNG file, {DPI} dots an inch on white."
    return Section("pictures", "Figures for slides", [Text(words), Links(places)]) if places else None
