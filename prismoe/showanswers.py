"""Answers, the experts of their tokens and MT-Bench, for the screen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from prismoe.console import Screen, count_text

__all__ = ["show_answered", "show_answers", "show_experts", "show_judged"]

_COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_cyan", "bright_yellow")
_LONGEST = 14  # letters of a token


def show_answered(screen: Screen, receipt: Mapping[str, Any]) -> None:
    """What `generate` did with a file."""
    screen.title("generate")
    before = f", {receipt['resumed']:,} of them before" if receipt["resumed"] else ""
    rate = f", {count_text(receipt['tokens_per_second'])} tokens/s" if receipt["tokens_per_second"] else ""
    screen.line(f"{receipt['out']}: {receipt['rows']:,} answers{before}, {receipt['ended']:,} ended by the model{rate}")


def show_answers(screen: Screen, receipt: Mapping[str, Any]) -> None:
    """What answering the benchmark's questions gave."""
    screen.title("answers")
    before = f", {receipt['resumed']} of them before" if receipt["resumed"] else ""
    cut = f", {receipt['cut']} of {receipt['turns']} turns cut at the limit" if receipt["turns"] else ""
    screen.line(f"{receipt['answers']}: {receipt['questions']} questions{before}{cut}")


def show_judged(screen: Screen, receipt: Mapping[str, Any]) -> None:
    """Scores by category; without judgments, where the requests are."""
    screen.title(f"MT-Bench, {receipt['model_id']} judged by {receipt['judge']}")
    total = receipt["scores"][-1]
    if not total["judged"] and not total["no_rating"]:
        screen.line(f"no judgments yet: {receipt['requests']} holds {total['failed']} requests")
        screen.line("judge=URL asks an endpoint; results=FILE reads what a batch of them gave", style="dim")
        return
    rows = []
    for row in receipt["scores"]:
        error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.2f}"
        means = [_mean(row["turn_1"]), _mean(row["turn_2"]), _mean(row["mean"]) + error]
        rows.append([row["category"], *means, *(str(row[name]) for name in ("judged", "no_rating", "failed"))])
    screen.table(["category", "turn 1", "turn 2", "both", "judged", "no rating", "failed"], rows)
    screen.line(f"judgments: {receipt['judgments']}", style="dim")


def show_experts(screen: Screen, found: Mapping[str, Any]) -> None:
    """A line for each token with the experts of each layer, best first; as many layers beside each other as fit."""
    chosen, layers = found["chosen"], found["layers"]
    cells = [[",".join(map(str, layer)) for layer in token] for token in chosen]
    wide = max([len(f"L{max(layers)}"), *(len(cell) for token in cells for cell in token)])
    names = [_shown(token) for token in found["tokens"]]
    fit = max(1, (screen.width - max(map(len, names), default=0) - 2) // (wide + 2))
    for begin in range(0, len(layers), fit):
        part = slice(begin, begin + fit)
        rows: list[list[str | Text]] = []
        for place, name in enumerate(names):
            if place < len(chosen):
                both = zip(cells[place][part], chosen[place][part], strict=True)
                rows.append([name, *(Text(cell, style=_COLOURS[best[0] % len(_COLOURS)]) for cell, best in both)])
            else:
                rows.append([name, *("–" for _ in layers[part])])
        screen.table(["token", *(f"L{layer}" for layer in layers[part])], rows)


def _shown(token: str) -> str:
    """A token as one printable word."""
    text = "".join(letter if letter.isprintable() else "·" for letter in token)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _mean(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
