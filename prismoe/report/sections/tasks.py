"""Benchmark tasks: every model beside chance, and in words whether it differs from the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.report.page import Block, Figure, Findings, Panel, Section, Table, Text
from prismoe.report.style import GREY, legend_above, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "section"]

PLACE = 8
Row = Mapping[str, Any]


def section(found: Findings) -> Section | None:
    """Of the stage `eval`, where it was asked for benchmark tasks."""
    receipt = found.receipts.get("eval", {})
    rows: Sequence[Row] = receipt.get("tasks", ())
    if not rows:
        return None
    models, tasks = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "task"))
    table = {(row["task"], row["model"]): row for row in rows}
    scores = [[*_task(table[task, models[0]]), *(_score(table[task, model]) for model in models)] for task in tasks]
    heads = ["task", "metric", "shots", "questions", "chance", *models]
    tables = [Table(heads, scores, left=(1,), caption="% right ± standard error; * is not above chance")]
    if len(models) > 1:
        caption = f"difference from {models[0]}, percentage points ± standard error of the paired difference"
        changes = [[task, *(_change(table[task, model]) for model in models[1:])] for task in tasks]
        tables.append(Table(["task", *models[1:]], changes, caption=caption))
    # Beating the static control is what a reader wants to know; the rest of the words stands behind the numbers.
    told = [Text(sentence) for sentence in receipt.get("findings", ())]
    blocks: list[Block] = [text for text in told if "control" in text.words]
    more = [text for text in told if "control" not in text.words]
    more += [Text(f"Warning: {text}.", look="bad") for text in receipt.get("warnings", ())]
    means = ", ".join(f"{model} {_mean(table, tasks, model):.1f} %" for model in models)
    panel = Panel(
        partial(_draw, table=table, tasks=tasks, models=models),
        f"Mean of tasks: {means}",
        height=1.5 + 0.36 * len(tasks),
    )
    about = (
        "Bars are one standard error over questions, the grey line is blind guessing. A difference is called "
        "significant when a paired test over the same questions says so, with Holm's correction (5 %)."
    )
    blocks.append(Figure("tasks", "Benchmark tasks", [panel], about))
    return Section("tasks", "Benchmark scores", [*blocks, *tables, *more])


def _mean(table: Mapping[tuple[str, str], Row], tasks: Sequence[str], model: str) -> float:
    single = [task for task in tasks if table[task, model]["num_fewshot"] is not None] or tasks
    return float(100 * sum(table[task, model]["score"] for task in single) / len(single))


def _task(row: Row) -> list[str]:
    chance = "" if row["chance"] is None else f"{100 * row['chance']:.1f}"
    shots = "" if row["num_fewshot"] is None else str(row["num_fewshot"])
    return [row["task"], row["metric"], shots, f"{row['num_documents']:,}", chance]


def _score(row: Row) -> str:
    error = row["standard_error"]
    text = f"{100 * row['score']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    return text + (" *" if row.get("above_chance") is False else "")


def _change(row: Row) -> str:
    error = row["change_standard_error"]
    number = f"{100 * row['change']:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
    words = {"significant": "significant", "not": "not significant"}.get(row["verdict"], row["verdict"])
    return f"{number}, {words}" if words else number


def _draw(axes: Axes, *, table: Mapping[tuple[str, str], Row], tasks: Sequence[str], models: Sequence[str]) -> None:
    apart = 0.62 / max(len(models), 1)
    for index, model in enumerate(models):
        rows = [table[task, model] for task in tasks]
        places = [line + apart * (index - (len(models) - 1) / 2) for line in range(len(tasks))]
        errors = [100 * (row["standard_error"] or 0.0) for row in rows]
        mark = {**look(index), "linestyle": "none", "markersize": 5, "elinewidth": 1.2}
        axes.errorbar([100 * row["score"] for row in rows], places, xerr=errors, label=model, **mark)
    for line, task in enumerate(tasks):
        chance = table[task, models[0]]["chance"]
        if chance is not None:
            axes.plot([100 * chance] * 2, [line - 0.4, line + 0.4], color=GREY, linewidth=1.4)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set(xlabel="% right", ylim=(len(tasks) - 0.5, -0.5))
    legend_above(axes)
