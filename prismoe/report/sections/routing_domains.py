"""How differently two domains are routed: the domain × domain matrices of LLaMA-MoE, and which domain is nearest."""

from __future__ import annotations

from typing import Any

import numpy as np

from prismoe.report.heat import heat_panel
from prismoe.report.page import Block, Figure, Findings, Panel, Section, Table

__all__ = ["PLACE", "section"]

PLACE = 52


def section(found: Findings) -> Section | None:
    """Of a routing trace with at least two domains."""
    trace = found.trace
    if trace is None or len(trace.domains) < 2:
        return None
    from prismoe.routing.metrics import distance_matrix, training_domains

    train = training_domains(trace)
    others = np.setdiff1d(np.arange(len(trace.domains)), train)
    matrices = {"last layer": distance_matrix(trace), "mean of layers": distance_matrix(trace, layers="mean")}
    top = max(float(matrix.max()) for matrix in matrices.values()) or 1.0
    blocks: list[Block] = []
    wanted = (
        ("train", "training domains", train, "Distance between training domains"),
        ("benchmark", "benchmarks", others, "Distance of benchmarks from training domains"),
    )
    for name, what, rows, caption in wanted:
        if not len(rows) or not len(train) or (name == "train" and len(train) < 2):
            continue
        panels = [_panel(matrix, rows, train, trace.domains, title, what, top) for title, matrix in matrices.items()]
        about = (
            "L2 distance between the routing vectors of two texts (shares of assignments of the experts of a layer, "
            "which sum to 1); 0 is the same routing, √2 different experts altogether. Definitions: docs/routing.md."
        )
        blocks.append(Figure(f"domain_distance_{name}", caption, panels, about))
    nearest = []
    for row in range(len(trace.domains)):
        candidates = [int(column) for column in train if column != row]
        if candidates:
            order = sorted(candidates, key=lambda column: float(matrices["mean of layers"][row, column]))
            found_ = [f"{trace.domains[column]} ({matrices['mean of layers'][row, column]:.3f})" for column in order]
            nearest.append([trace.domains[row], found_[0], found_[-1]])
    if nearest:
        heads = ["text", "nearest training domain", "farthest"]
        blocks.append(Table(heads, nearest, left=(1, 2), caption="by the mean of layers"))
    return Section("domains", "How domains differ in routing", blocks) if blocks else None


def _panel(matrix: Any, rows: Any, columns: Any, names: tuple[str, ...], title: str, what: str, top: float) -> Panel:
    part = matrix[np.ix_(rows, columns)]
    apart = np.where(rows[:, None] == columns[None], -1.0, part)
    row, column = np.unravel_index(int(apart.argmax()), apart.shape)
    pair = f"{names[rows[row]]} and {names[columns[column]]}"
    shows = f"Distances of {what} from training domains, {title}: most between {pair}, {part[row, column]:.3f}"
    return heat_panel(
        part,
        columns=[names[index] for index in columns],
        rows=[names[index] for index in rows],
        top=top,
        label="distance",
        shows=shows,
        title=title,
        cell=(0.34, 0.28),
        form=".2f",
        upright=True,
    )
