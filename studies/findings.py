"""Numbers of the results: means and spreads over seeds, paired tests over documents, tokens to close a gap."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.evaluate.compare import holm, paired_p

__all__ = ["Findings", "Line", "spread"]

SHARES = (0.5, 0.8, 0.9)


@dataclass(frozen=True)
class Line:
    """A setting under all of its seeds. `runs` are those that are there, in the order of their seeds, of `wanted`."""

    name: str
    runs: tuple[dict[str, Any], ...]
    wanted: int = 0

    @property
    def ended(self) -> tuple[dict[str, Any], ...]:
        return tuple(run for run in self.runs if not run["diverged"])

    def curve(self, metric: str) -> tuple[list[int], npt.NDArray[np.float64]]:
        """Tokens, and [seeds, evaluations]; `metric` as `design.Panel` has it. Seeds that diverged are left out."""
        rows = [_metric(run, metric) for run in self.ended if run["curve_tokens"]]
        rows = [row for row in rows if row]
        return self.ended[0]["curve_tokens"] if rows else [], np.array(rows)

    @property
    def start(self) -> list[float]:
        return [_metric(run, "heldout")[0] for run in self.runs if run["heldout"]]

    @property
    def end(self) -> list[float]:
        """Mean over domains of the loss on whole documents, seed by seed."""
        return [float(np.mean([sum(nats) for nats in self._losses(run)])) for run in self.ended]

    def _losses(self, run: dict[str, Any]) -> list[npt.NDArray[np.float64]]:
        return [np.array(nats) for nats in run["scaled"].values()]

    def documents(self) -> list[npt.NDArray[np.float64]]:
        """For each domain the documents' shares of its loss, times their number: mean over seeds."""
        per_seed = [self._losses(run) for run in self.ended]
        return [len(domain[0]) * np.mean(domain, axis=0) for domain in zip(*per_seed, strict=True)]


class Findings:
    """All results in a folder, as `runner.collect` wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "parent.json").exists():
            raise InputError("no results", where=str(folder), needed="parent.json", hint="python -m studies.runner")
        self.parent = json.loads((folder / "parent.json").read_bytes())
        self._tokens = {name: sum(counts) for name, counts in self.parent["document_tokens"].items()}

    @cached_property
    def files(self) -> dict[str, dict[str, Any]]:
        paths = [path for path in sorted(self.folder.glob("*.json")) if path.name != "parent.json"]
        return {path.stem: json.loads(path.read_bytes()) for path in paths}

    @cached_property
    def runs(self) -> dict[str, dict[str, Any]]:
        """By key; `scaled` are a document's nats over the tokens of its domain, whose sum is the domain's loss."""
        found = {run["key"]: run for file in self.files.values() for run in file["runs"]}
        for run in found.values():
            documents = run.get("documents", {})
            run["scaled"] = {name: np.array(nats) / self._tokens[name] for name, nats in documents.items()}
        return found

    def lines(self, question: str) -> list[Line]:
        """The settings of a question, in its order, those without a single run too."""
        settings = self.files.get(question, {"settings": {}})["settings"]
        return [
            Line(name, tuple(self.runs[key] for key in keys if key in self.runs), len(keys))
            for name, keys in settings.items()
        ]

    @property
    def eval_tokens(self) -> int:
        """Of each domain, on which runs are measured while they train."""
        return int(self.parent["eval_tokens"])

    @property
    def parent_loss(self) -> float:
        """On whole documents."""
        documents = self.parent["documents"]
        return statistics.fmean(sum(documents[name]) / self._tokens[name] for name in documents)

    @property
    def parent_heldout(self) -> float:
        """On the text that runs are measured on while they train."""
        return statistics.fmean(self.parent["heldout"].values())

    def tests(self, against: Sequence[tuple[Line, Line]]) -> dict[str, tuple[list[float], float]]:
        """For each pair the first's differences to the second, seed by seed, and p over documents, corrected by Holm.

        The p value speaks of other text, at these seeds: documents' differences, averaged over seeds, under random
        signs, domains counting alike.
        """
        found = {}
        for line, first in against:
            pairs = [(mine, theirs) for mine in line.ended for theirs in first.ended if mine["seed"] == theirs["seed"]]
            if not pairs:
                continue
            mine, theirs = (Line("", tuple(pair[side] for pair in pairs)) for side in (0, 1))
            gaps = [a - b for a, b in zip(mine.documents(), theirs.documents(), strict=True)]
            found[line.name] = [a - b for a, b in zip(mine.end, theirs.end, strict=True)], paired_p(gaps)
        adjusted = holm([p for _, p in found.values()])
        return {name: (gaps, p) for (name, (gaps, _)), p in zip(found.items(), adjusted, strict=True)}

    def tokens_to(self, line: Line, share: float, *, start: float) -> list[float | None]:
        """Tokens until `share` of the gap from the loss `start` to the parent is closed, seed by seed; None: never."""
        target = start - share * (start - self.parent_heldout)
        found: list[float | None] = []
        for run in line.ended:
            losses, tokens = _metric(run, "heldout"), run["curve_tokens"]
            if losses[0] <= target:
                found.append(float(tokens[0]))
                continue
            there = next((i for i, loss in enumerate(losses) if loss <= target), None)
            if there is None:
                found.append(None)
                continue
            before, after = losses[there - 1], losses[there]
            part = (before - target) / (before - after)
            found.append(tokens[there - 1] + part * (tokens[there] - tokens[there - 1]))
        return found


def spread(values: Sequence[float], digits: int = 3, *, sign: bool = False) -> str:
    """Mean ± standard deviation over seeds."""
    if not values:
        return ""
    plus = "+" if sign else ""
    text = f"{statistics.fmean(values):{plus}.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _metric(run: dict[str, Any], metric: str) -> list[float]:
    """One number for each evaluation; empty where the run has none of that."""
    kind, _, domain = metric.partition(":")
    if kind == "heldout" and domain:
        return list(run["heldout"].get(domain, ()))
    if kind == "heldout":
        return [statistics.fmean(losses) for losses in zip(*run["heldout"].values(), strict=True)]
    if kind == "weight":
        return list(run.get("weights", {}).get(domain, ()))
    return list(run.get(kind, ()))
