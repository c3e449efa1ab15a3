"""`write_report`: a run folder as one HTML page that needs nothing else: no script, no network, figures inside.

Every part appears as soon as its stage is finished, so a report can be written at any time. A file of `sections/` is
one section; the same figures lie as PNG files beside the page.
"""

from __future__ import annotations

from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from prismoe import registry
from prismoe.errors import InputError, ResourceError
from prismoe.folder import write_atomic
from prismoe.report.card import write_cards
from prismoe.report.headline import numbers
from prismoe.report.page import Figure, Findings, Section
from prismoe.state import read_state
from prismoe.views import summary

__all__ = ["can_report", "write_report"]

NAME = "report.html"
SECTIONS = "prismoe.report.sections"


def can_report() -> bool:
    """Whether the packages of `prismoe[report]` are there."""
    return all(find_spec(name) for name in ("jinja2", "matplotlib"))


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` into a run folder from what its finished stages left there, its figures as PNG files,
    and a model card (README.md) into each finished model folder.

    Raises:
        InputError: not a run folder, or a damaged trace.
        ResourceError: jinja2 or matplotlib is not installed, or the folder cannot be written.
    """
    folder = Path(run_folder)
    if not can_report():
        raise ResourceError("jinja2 or matplotlib is not installed", needed="pip install 'prismoe[report]'")
    state = read_state(folder)
    if "plan" not in state:
        raise InputError("no finished plan", where=str(folder), needed="a run folder", hint="prismoe run CONFIG")
    import jinja2

    from prismoe.report.drawing import draw
    from prismoe.report.pictures import write_pictures

    found = Findings(
        folder,
        receipts={name: record["receipt"] for name, record in state.items()},
        seconds={name: float(record["seconds"]) for name, record in state.items()},
    )
    sections = _sections(found)
    figures = [block for section in sections for block in section.blocks if isinstance(block, Figure)]
    drawn = dict(zip(figures, draw(figures), strict=True))
    sections += [pictures] if (pictures := write_pictures(folder, drawn)) else []
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        files("prismoe.report").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    plan = found.receipts["plan"]
    text = page.render(
        title=f"{Path(plan['source_name']).name} as {plan['account']['target']}",
        subtitle=summary("plan", plan),
        numbers=numbers(found),
        sections=sections,
        drawn={figure.name: picture.svgs for figure, picture in drawn.items()},
    )
    path = folder / NAME
    write_atomic(path, text.encode())
    write_cards(found)
    return path


def _sections(found: Findings) -> list[Section]:
    """What every file of `sections/` has to tell, in their order."""
    makers = [registry.load(SECTIONS, name, where="report") for name in registry.names(SECTIONS)]
    told = [maker.section(found) for maker in sorted(makers, key=lambda maker: int(maker.PLACE))]
    return [section for section in told if section is not None]
