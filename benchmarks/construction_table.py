"""What the results of benchmarks/construction.py say: docs/construction.md, .json and .png.

python benchmarks/construction_table.py DIR          # from results that are there
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OWN, SEVEN = slice(0, 1), slice(1, None)
WHERE = {"TinyStories": OWN, "seven": SEVEN}
SCALES = ("none", "unit", "paper", "mean", "norm", "measured")
ROUTERS = ("zero", "random", "prompts", "centroid", "regressed", "from", "auto")
METHODS = (
    "random",
    "clustering",
    "coactivation",
    "router_first",
    "gradient independent",
    "gradient inter",
    "gradient inner",
)
LAST = ("router_first", "upcycle")  # what is measured last of all
NAMES = {"from": "from a file", "auto": "its own"}


class Cells:
    """Losses of one model at one share of active neurons over the seeds; `names` are the mixtures."""

    def __init__(self, parts: list[dict[str, Any]]) -> None:
        self.parts = parts
        self.model, self.percent, self.active = parts[0]["model"], parts[0]["percent"], parts[0]["active"]
        self.ended = all(part["done"][-1] in LAST for part in parts)
        found = dict.fromkeys(name for part in parts for name in (*part["losses"], *part["same"]))
        self.names = sorted((name for name in found if name.count("|") == 2 and self.everywhere(name)), key=place)
        self.controls = [name for name in parts[0]["losses"] if name.startswith("prune")]

    def everywhere(self, name: str) -> bool:
        """Whether no seed refused it."""
        return all(name in part["losses"] or name in part["same"] for part in self.parts)

    def values(self, name: str, domains: slice) -> list[float]:
        """Perplexity for each seed: exp of the mean loss over `domains`."""
        losses = [part["losses"][part["same"].get(name, name)] for part in self.parts]
        return [math.exp(statistics.fmean(row[domains])) for row in losses]

    def mean(self, name: str, domains: slice) -> float:
        return statistics.fmean(self.values(name, domains))

    def text(self, name: str) -> str:
        return " · ".join(number(self.values(name, domains)) for domains in (OWN, SEVEN))

    def best(self, names: Iterable[str], domains: slice) -> str:
        return min(names, key=lambda name: self.mean(name, domains))

    def errors(self, kind: str) -> list[list[float]]:
        return [pair for part in self.parts for name, pair in part["errors"][kind].items() if name.count("|") == 2]


def place(name: str) -> tuple[int, int, int]:
    """Where "random|from|paper" stands in a table."""
    method, router, scale = name.split("|")
    return METHODS.index(method), ROUTERS.index(router), SCALES.index(scale)


def number(values: list[float]) -> str:
    mean = statistics.fmean(values)
    digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else "")


def spoken(name: str) -> str:
    """ "random|from|paper" as words."""
    method, *rest = name.split("|")
    return ", ".join([method, *(NAMES.get(part, part) for part in rest)])


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def section(cells: Cells) -> str:
    """All cells of one model at one share: a row for each method and router, a column for each scale."""
    split = [name.split("|") for name in cells.names]
    rows = []
    for method, router in unique((row[0], row[1]) for row in split):
        label = [f"{method} ({cells.active[method]:g} %)", NAMES.get(router, router)]
        found = [f"{method}|{router}|{scale}" for scale in SCALES]
        rows.append([*label, *(cells.text(name) if name in cells.names else "" for name in found)])
    fixed = [[spoken(name).replace(",", " by"), cells.text(name)] for name in ("dense", *cells.controls)]
    return "\n\n".join(
        [
            f"## {cells.model}, {cells.percent} % of the FFN active",
            table(["beside", "perplexity"], fixed),
            table(["method", "router rows", *SCALES], rows),
        ]
    )


def copies(cells: Cells) -> str:
    rows = [[name, cells.text(name)] for name in cells.parts[0]["losses"]]
    return f"## {cells.model}, copies: the whole FFN active\n\n" + table(["model", "perplexity"], rows)


def summary(found: list[Cells]) -> str:
    """Who wins, and by how much, in each model, share and kind of text."""
    head = ["model", "active", "text", "dense", "best control", "best mixture", "mixtures better than the control"]
    rows = []
    for cells in found:
        for text, domains in WHERE.items():
            control, best = cells.best(cells.controls, domains), cells.best(cells.names, domains)
            limit = cells.mean(control, domains)
            better = sum(cells.mean(name, domains) < limit for name in cells.names)
            named = [f"{number(cells.values(name, domains))} ({spoken(name)})" for name in (control, best)]
            dense = number(cells.values("dense", domains))
            rows.append([cells.model, f"{cells.percent} %", text, dense, *named, f"{better} of {len(cells.names)}"])
    return table(head, rows)


def choices(found: list[Cells], part: int) -> str:
    """What a choice (0 method, 1 router, 2 scale) is worth: geometric mean of perplexity over the rest, and best."""
    kinds = unique(name.split("|")[part] for cells in found for name in cells.names)
    if part == 1:  # their cells are not those of the others
        kinds = [kind for kind in kinds if kind not in NAMES]
    rows = []
    for kind in kinds:
        row = [kind]
        for cells in found:
            for domains in WHERE.values():
                names = [n for n in cells.names if n.split("|")[part] == kind and n.split("|")[1] not in NAMES]
                values = [cells.mean(name, domains) for name in names]
                row.append(f"{shorter(statistics.geometric_mean(values))} ({shorter(min(values))})" if values else "")
        rows.append(row)
    head = [f"{cells.model} {cells.percent} %, {text}" for cells in found for text in WHERE]
    return table([("method", "router rows", "scale")[part], *head], rows)


def shorter(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def picture(found: list[Cells], path: Path) -> None:
    """Seven domains and TinyStories: each cell against the best control, blue where the mixture is better."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = unique(tuple(name.split("|")[:2]) for cells in found for name in cells.names)
    figure, axes = plt.subplots(1, 2 * len(found), figsize=(16, 11), sharey=True, layout="constrained")
    shown = None
    for column, axis in enumerate(axes):
        cells, (text, domains) = found[column // 2], list(WHERE.items())[column % 2]
        limit = cells.mean(cells.best(cells.controls, domains), domains)
        cell = {name: math.log10(cells.mean(name, domains) / limit) for name in cells.names}
        grid = [[cell.get("|".join((*row, scale)), math.nan) for scale in SCALES] for row in rows]
        shown = axis.imshow(grid, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        axis.set_facecolor("0.6")  # not measured
        axis.set_title(f"{cells.model}\n{cells.percent} %, {text}", fontsize=9)
        axis.set_xticks(range(len(SCALES)), SCALES, rotation=90, fontsize=8)
        axis.set_yticks(range(len(rows)), [f"{row[0]}, {NAMES.get(row[1], row[1])}" for row in rows], fontsize=7)
    assert shown is not None
    bar = figure.colorbar(shown, ax=axes, ticks=[-2, -1, 0, 1, 2], shrink=0.5)
    bar.ax.set_yticklabels(["100 times lower", "10 times", "as the control", "10 times", "100 times higher"])
    figure.suptitle("Perplexity before training, against the best pruned model with as many active neurons")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)


def by_size(parts: list[dict[str, Any]]) -> list[Cells]:
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for part in parts:
        grouped.setdefault((part["model"], -part["percent"]), []).append(part)
    return [Cells(found) for _, found in sorted(grouped.items())]


def document(parts: list[dict[str, Any]], reading: str) -> str:
    from prismoe.folder import versions

    every = by_size(parts)
    found, whole = [c for c in every if c.percent < 100], [c for c in every if c.percent == 100]
    open_ones = [f"{cells.model} {cells.percent} %" for cells in every if not cells.ended]
    refused = sorted({f"- `{name}`: {why}" for part in parts for name, why in part["refused"].items()})
    measured = sum(len(part["losses"]) for part in parts)
    same = sum(len(part["same"]) for part in parts)
    plain = [pair for cells in found for pair in cells.errors("standard_error")]
    paired = [pair for cells in found for pair in cells.errors("change_standard_error")]
    own, seven = parts[0]["tokens"][0], sum(parts[0]["tokens"][1:])
    drawn = {f"{c.model} {c.percent} %": ", ".join(str(part["seed"]) for part in c.parts) for c in every}
    same_seeds = len(set(drawn.values())) == 1
    seeds = drawn.popitem()[1] if same_seeds else "; ".join(f"{name}: {text}" for name, text in drawn.items())
    head = f"""# Perplexity before any training

Written by `python benchmarks/construction.py --shared ../shared --work DIR`; [construction.json](construction.json) has
the loss of every model, seed and domain.

![every cell against the best control](construction.png)

- Each cell: perplexity on TinyStories, which both models were trained on · on the seven other domains (exp of the mean
  of their losses a token). Mean ± standard deviation over seeds; lower is better. A seed draws all: split, router rows,
  calibration text. Seeds: {seeds}.
- The held-out text is the same for all: the first {own // 32} tokens of 32 TinyStories and of 8 documents of each
  other domain, {own} and {seven} scored tokens.
- What so little text leaves open: the standard error of a loss over documents is {middle(plain, 0)} on TinyStories and
  {middle(plain, 1)} nats on the seven; of a loss minus that of the control `prune by activation` on the same text
  {middle(paired, 0)} and {middle(paired, 1)} (medians, in brackets the largest). Two cells that differ by less than a
  tenth do not differ.
- Calibration: 8192 tokens, all eight domains in equal parts, as many text clusters as experts.
- Router rows `prompts`: two documents' first 200 characters from each domain that falls to an expert. `from a file`
  (`router=from:FILE`): rows that `regressed` fitted to the experts of a random split, so for any other split they are
  rows that know the text and not the experts; measured at the scales `paper` and `measured` only, since a file is a
  store and no rule of its own. `its own`: the rows that router_first makes.
- Scales: `none` 1, `unit` K, `paper` E/K, `mean` and `norm` from how many experts hold a neuron, `measured` from the
  calibration text. Where two of them come to one number the plans are equal, and were measured once.
- `prune` is the static control: one smaller dense FFN, no router. In brackets: what is active of the FFN.
- Not here: `branch`, which needs several fine-tuned checkpoints of one base, and there are none of these two models;
  copies (`upcycle`) run a whole FFN a token, so they stand apart, at the end, and no router or scale changes a plain
  one; `gradient inter` with `share`, `clustering` by gate_proj or cosine, and accumulations of importance other than
  `l1`.
- {measured} models measured, {same} cells equal to one of them; {sum(part["verified"] for part in parts)} conversions
  (under each seed: every method with drawn rows and scale E/K, a control, all copies) went through `verify` and passed.
- {platform.machine()}, {os.cpu_count()} cores, one thread, {sum(part["cpu"] for part in parts):.0f} CPU-seconds; Python
  {platform.python_version()}, {", ".join(f"{name} {value}" for name, value in sorted(versions().items()))}.

## In short

"""
    bodies = [
        summary(found),
        *([reading] if reading else []),
        "## What each choice is worth\n\nGeometric mean of perplexity over all cells with that choice; in brackets the "
        "best of them. Rows from a file and router_first's own are left out: they are not crossed with everything.",
        *(choices(found, part) for part in range(3)),
        *map(section, found),
        *map(copies, whole),
    ]
    if open_ones:
        bodies.insert(0, f"**Not all methods have been measured yet: {', '.join(open_ones)}.**")
    if refused:
        bodies.append("Refused:\n\n" + "\n".join(refused))
    return head + "\n\n".join(bodies) + "\n"


def middle(pairs: list[list[float]], which: int) -> str:
    values = [pair[which] for pair in pairs]
    return f"{statistics.median(values):.2f} ({max(values):.2f})"


def write(work: Path, docs: Path) -> None:
    """Tables, picture and numbers of all results in `work` into `docs`, with the reading that stands there."""
    from prismoe.folder import write_atomic

    parts = [json.loads(path.read_bytes()) for path in sorted(work.glob("*-*-[0-9]*.json"))]
    ended = [part for part in parts if part["done"] and part["done"][-1] in LAST]
    sizes = {(part["model"], part["percent"]) for part in ended}
    parts = ended + [part for part in parts if (part["model"], part["percent"]) not in sizes]
    reading = docs / "construction-reading.md"
    note = reading.read_text().strip() if reading.is_file() else ""
    write_atomic(docs / "construction.md", document(parts, note).encode())
    line = json.dumps({"parts": parts}, separators=(",", ":")).replace('],"', '],\n"')
    write_atomic(docs / "construction.json", (line + "\n").encode())
    picture([cells for cells in by_size(parts) if cells.percent < 100], docs / "construction.png")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    write(Path(sys.argv[1]), ROOT / "docs")
