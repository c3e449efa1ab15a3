"""`python -m studies.write`: docs/study.md and its figures from the results. What people wrote into it stays.

Between `<!-- conclusions NAME -->` and `<!-- end -->` is theirs.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prismoe.errors import PrismoeError
from prismoe.folder import make_folder, write_atomic
from prismoe.report.drawing import draw
from prismoe.report.page import Figure
from prismoe.report.page import Panel as Axis
from prismoe.report.style import legend_above, look, reference_line
from studies.arms import questions
from studies.design import PARENT_TOKENS, Panel, Question
from studies.findings import SHARES, Findings, Line, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write"]

LABELS = {
    "heldout": "held-out loss (nats per token)",
    "closed": "share of the gap closed",
    "entropy": "entropy / ln E",
    "busiest": "largest load / mean",
    "idle": "experts without a token",
    "weight": "weight of the domain",
}
EMPTY = "(not written yet)"
ENOUGH = 3  # seeds, to call a row better or worse
LEAST_GAP = 0.1  # nats a token to the parent, of which a share can be closed


def write(results: Path, docs: Path) -> Path:
    """Write DOCS/study.md and DOCS/study/*.png; conclusions that stand in the page are kept."""
    found, page = Findings(results), docs / "study.md"
    kept = _conclusions(page.read_text()) if page.exists() else {}
    parts = [_head(found), _conclusion("summary", kept)]
    figures = []
    for question in questions():
        lines = found.lines(question.name)
        if any(line.runs for line in lines):
            axes = [axis for panel in question.panels if (axis := _axis(found, lines, panel))]
            figures.append(Figure(question.name, question.title, axes))
            parts += _section(found, question, lines, kept)
        elif question.name in kept:
            parts += [f"## {question.title}", _conclusion(question.name, kept)]
    make_folder(docs / "study")
    for figure, drawn in zip(figures, draw(figures), strict=True):
        write_atomic(docs / "study" / f"{figure.name}.png", drawn.png)
    write_atomic(page, ("\n\n".join(parts) + "\n").encode())
    return page


def _head(found: Findings) -> str:
    runs = list(found.runs.values())
    seconds, cpu = (sum(run[key] for run in runs) for key in ("seconds", "cpu_seconds"))
    diverged = [run for run in runs if run["diverged"]]
    wanted = {key for file in found.files.values() for keys in file["settings"].values() for key in keys}
    missing = (
        f"**{len(wanted - found.runs.keys())} of {len(wanted)} runs are not there yet.** "
        if wanted - found.runs.keys()
        else ""
    )
    machines = " · ".join(dict.fromkeys(run["machine"] for run in runs))
    versions = " · ".join(
        dict.fromkeys(", ".join(f"{name} {version}" for name, version in run["versions"].items()) for run in runs)
    )
    return f"""# The study

Written by `python -m studies.write` from [studies/results](../studies/results), which `make study` makes; only the
conclusions are written by people.

- {missing}{len(runs)} runs ({len(diverged)} diverged) of size {found.parent["size"]}, {seconds / 3600:.1f} hours of
  runs, {cpu:.0f} CPU-seconds, {sum(run["tokens"] for run in runs) / 1e6:.0f} M tokens; {machines}; {versions}.
- The parent: [studies/parent](../studies/parent), {PARENT_TOKENS / 1e6:.0f} M tokens, mean held-out loss
  {found.parent_loss:.3f} nats a token. Arms of a seed read the same batches, unless text or weights differ.
- Loss: mean over the seven domains of the nats a token of whole documents cut to one window
  ({sum(map(len, found.parent["document_tokens"].values()))} documents), in float32 at the end of training; ± is the
  standard deviation over seeds. `change` is that to the row named in `against` (to the first where none is named),
  under the same seed; p is of a paired test (random signs) over documents, averaged over seeds, after Holm's
  correction over the table: it speaks of other text. `seeds` says in how many the change has the sign of the mean. A
  row is called better or worse where p < 0.05 and all of three or more seeds agree, none of them diverged.
- `gap closed` is the share of the way from the loss before training (of the row in `against` if there is one; under
  Recovery of the first row) to the parent's loss, where that is more than {LEAST_GAP}. It, curves, and tokens to
  close a gap are of a part of that text: the first {found.eval_tokens} tokens or so of each domain.
- Figures of losses leave out that before training; the dashed line is the parent; bands are all seeds."""


def _section(found: Findings, question: Question, lines: Sequence[Line], kept: Mapping[str, str]) -> list[str]:
    by_name = {line.name: line for line in lines if line.runs}
    first = question.settings[0].name
    against = {setting.name: by_name.get(setting.against or first) for setting in question.settings}
    pairs = [(line, other) for line in by_name.values() if (other := against[line.name]) and other is not line]
    tests = found.tests(pairs)
    routed = any("entropy" in run for line in lines for run in line.runs)
    head = ["setting", "runs", "before", "loss", "against", "change", "p", "seeds", "gap closed"]
    head += ["entropy", "idle", "busiest"] * routed + ["M tokens", "tokens/s", "s a run"]
    # Where figures show the share of a gap, it is the same gap for all.
    common = by_name.get(first) if any(panel.metric == "closed" for panel in question.panels) else None
    rows = [
        _row(
            found,
            line,
            tests.get(line.name),
            against[line.name],
            start=statistics.fmean((common or against[line.name] or line).start),
            routed=routed,
            first=first,
        )
        for line in by_name.values()
    ]
    parts = [f"## {question.title}", f"Answers to {question.paper}. {question.about}"]
    parts += [f"![{question.title}](study/{question.name}.png)", _table(head, rows)]
    if missing := [line.name for line in lines if not line.runs]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    parts += [
        f"Diverged: {line.name}, seed {run['seed']}: {run['diverged']}."
        for line in by_name.values()
        for run in line.runs
        if run["diverged"]
    ]
    if common is not None:
        parts.append(_closing(found, list(by_name.values()), statistics.fmean(common.start)))
    command = f"python -m studies.runner --corpora FOLDER --only {question.name}"
    seconds = sum(run["seconds"] for line in lines for run in line.runs)
    parts.append(f"`{command}`; {seconds / 60:.0f} minutes of runs, those shared with other questions included.")
    return [*parts, _conclusion(question.name, kept)]


def _row(
    found: Findings,
    line: Line,
    test: tuple[list[float], float] | None,
    against: Line | None,
    *,
    start: float,
    routed: bool,
    first: str,
) -> list[str]:
    diverged = len(line.runs) - len(line.ended)
    runs = (
        f"{len(line.runs)}"
        + f" of {line.wanted}" * (len(line.runs) < line.wanted)
        + f", {diverged} diverged" * bool(diverged)
    )
    row = [line.name, runs, spread(line.start, 2), spread(line.end)]
    if test is None or against is None:
        row += ["", "", "", ""]
    else:
        gaps, p = test
        mean = statistics.fmean(gaps)
        agree = sum(gap * mean > 0 for gap in gaps)
        whole = len(gaps) >= ENOUGH and len(gaps) == len(line.runs) == len(against.runs)
        verdict = (" **better**" if mean < 0 else " **worse**") if whole and p < 0.05 and agree == len(gaps) else ""
        name = "" if against.name == first else against.name
        row += [name, spread(gaps, sign=True), f"{p:.2g}", f"{agree}/{len(gaps)}{verdict}"]
    gap, ends = start - found.parent_heldout, [values[-1] for values in line.curve("heldout")[1]]
    closed = [100 * (start - end) / gap for end in ends] if gap > LEAST_GAP else []
    row.append(f"{spread(closed, 1)} %" if closed else "")
    for metric in ("entropy", "idle", "busiest") if routed else ():
        values = [float(rows[-1]) for rows in line.curve(metric)[1]]
        row.append(spread(values, 1 if metric == "idle" else 2))
    ended = line.ended or line.runs
    tokens, rates, seconds = ([run.get(key, 0) for run in ended] for key in ("tokens", "tokens_per_second", "seconds"))
    return [*row, f"{statistics.fmean(tokens) / 1e6:.2f}", f"{statistics.fmean(rates):,.0f}", f"{max(seconds):.0f}"]


def _closing(found: Findings, lines: Sequence[Line], start: float) -> str:
    """Tokens to close shares of the gap from the first setting's start to the parent."""
    head = ["tokens to close", *(f"{100 * share:.0f} % of the gap" for share in SHARES)]
    rows: list[list[str]] = []
    seen: set[str] = set()
    for line in lines:
        if line.runs[0]["key"] in seen:  # compared with two others
            continue
        seen.add(line.runs[0]["key"])
        row = [line.name]
        for share in SHARES:
            tokens = found.tokens_to(line, share, start=start)
            reached = [value / 1000 for value in tokens if value is not None]
            few = f" ({len(reached)} of {len(tokens)} seeds)" if len(reached) < len(tokens) else ""
            row.append(f"{spread(reached, 0)} k{few}" if reached else "never")
        rows.append(row)
    return _table(head, rows)


def _axis(found: Findings, lines: Sequence[Line], panel: Panel) -> Axis | None:
    """None where no line of the panel has such a curve."""
    chosen = [line for line in lines if line.runs and (not panel.settings or line.name in panel.settings)]
    if panel.metric == "closed" and not lines[0].runs:
        chosen = []  # nothing to measure the gap from
    start = statistics.fmean(lines[0].start or [0.0])
    curves = []
    for line in chosen:
        tokens, rows = line.curve("heldout" if panel.metric == "closed" else panel.metric)
        if len(rows):
            rows = (start - rows) / (start - found.parent_heldout) if panel.metric == "closed" else rows
            curves.append((line.name, np.array(tokens) / 1000, rows))
    if not curves:
        return None
    domain = panel.metric.partition(":")[2]
    parent = found.parent["heldout"][domain] if domain and panel.metric.startswith("heldout") else found.parent_heldout
    level = {"heldout": parent, "closed": 1.0}.get(panel.metric.partition(":")[0])
    shows = ", ".join(f"{name} {rows[:, -1].mean():.3f}" for name, _, rows in curves)
    rows = len(curves) if any(len(name) >= 30 for name, _, _ in curves) else len(curves) // 2  # of the legend
    height = 3.4 + 0.2 * rows
    paint = partial(_draw, curves=curves, label=LABELS[panel.metric.partition(":")[0]], level=level)
    return Axis(paint, f"{panel.title}: at the end {shows}", panel.title, height=height)


def _draw(axes: Axes, *, curves: Sequence[tuple[str, Any, Any]], label: str, level: float | None) -> None:
    for index, (name, tokens, rows) in enumerate(curves):
        first = 1 if label == LABELS["heldout"] and len(tokens) > 2 else 0
        style = look(index)
        axes.plot(tokens[first:], rows[:, first:].mean(axis=0), label=name, markersize=3.5, linewidth=1.3, **style)
        low, high = rows[:, first:].min(axis=0), rows[:, first:].max(axis=0)
        axes.fill_between(tokens[first:], low, high, color=style["color"], alpha=0.15, linewidth=0)
    if level is not None:
        reference_line(axes, level)
    axes.set(xlabel="thousand tokens", ylabel=label)
    legend_above(axes)


def _conclusions(text: str) -> dict[str, str]:
    return dict(re.findall(r"<!-- conclusions (\w+) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL))


def _conclusion(name: str, kept: Mapping[str, str]) -> str:
    return f"<!-- conclusions {name} -->\n{kept.get(name, EMPTY)}\n<!-- end -->"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("studies/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args()
    try:
        print(write(args.results, args.docs))
    except PrismoeError as error:
        print(f"study: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
