"""How far routing moved between two checkpoints, on the same text."""

from __future__ import annotations

from functools import partial

from prismoe.errors import InputError
from prismoe.report.page import Figure, Findings, Panel, Section, Text
from prismoe.report.sections.routing_depth import curves

__all__ = ["PLACE", "section"]

PLACE = 55


def section(found: Findings) -> Section | None:
    """Of two routing traces, where an earlier model was traced too."""
    from prismoe.routing.findings import BEFORE
    from prismoe.routing.metrics import drift
    from prismoe.routing.record import RoutingTrace

    trace, path = found.trace, found.folder / "trace" / BEFORE
    if trace is None or not path.is_file():
        return None
    try:
        moved = drift(RoutingTrace.open(path), trace)
    except InputError as error:
        return Section("drift", "How far routing has moved", [Text(f"The earlier trace is of no use: {error}", "bad")])
    ends = [100 * float(values_GL.mean()) for values_GL in (moved.moved_GL, moved.kept_GL)]
    text = (
        f"Since the earlier checkpoint {ends[0]:.0f} % of the load moved to other experts, and {ends[1]:.0f} % of the "
        f"choices for sampled tokens stayed (mean of texts and layers)."
    )
    figures = []
    for name, caption, values_GL, about in (
        ("load_moved", "Load that changed hands", moved.moved_GL, "The share of a text's assignments."),
        ("choices_kept", "Choices that stayed", moved.kept_GL, "The share of the experts of sampled tokens."),
    ):
        shows = f"{caption}: {100 * values_GL.min():.0f} to {100 * values_GL.max():.0f} %"
        draw = partial(curves, layers=trace.layers, values_GL=100 * values_GL, names=trace.domains, label="%", low=0.0)
        figures.append(
            Figure(name, caption, [Panel(draw, shows, height=3.4)], f"{about} Definitions: docs/routing.md.")
        )
    return Section("drift", "How far routing has moved", [Text(text), *figures])
