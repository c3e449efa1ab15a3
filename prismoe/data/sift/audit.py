"""The audit of a sift: what each filter did to each domain, with documents to read, as JSON and as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.sift.columns import read
from prismoe.data.sift.decide import BENCHMARK, NEAR, Copies, reason_names
from prismoe.data.sift.scoring import documents_of
from prismoe.data.sift.work import Filter, Part, Work

__all__ = ["HTML", "JSON", "can_draw", "collect", "page"]

JSON, HTML = "audit.json", "audit.html"
BINS = 60
SAMPLES = 4  # on either side of a threshold, of each broken rule, of each kind of copy
EXCERPT = 1200  # characters of a sample
_LOOKED_AT = 20_000  # documents of a domain that samples are drawn from: reading them again is cheap

Rows = list[tuple[Part, int, float]]
"""Documents as (file, row, score)."""


def collect(
    work: Work,
    folders: Mapping[str, Path],
    thresholds: Mapping[str, Mapping[str, float]],
    copies: Copies,
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that the page shows, JSON-able."""
    by_name = {(row["filter"], row["title"], row["domain"]): row for row in summary["filters"]}
    filters = []
    for item in work.filters:
        rows = []
        for domain in item.domains:
            row = dict(by_name[item.name, item.title, domain])
            make = _graded if item.drop is not None else _ruled
            rows.append({**row, **make(work, item, domain, folders[domain], thresholds[domain][item.column])})
        about = (item.module.__doc__ or "").partition("\n\n")[0].replace("\n", " ")
        unit = getattr(item.module, "SCORE", "")
        model = str(item.arguments.get("model") or "")
        filters.append({"name": item.name, "title": item.title, "about": about, "unit": unit, "model": model})
        filters[-1] |= {"graded": item.drop is not None, "domains": rows}
    return {
        "deduplicate": work.deduplicate,
        "reasons": list(reason_names(work).values()),
        "domains": summary["domains"],
        "filters": filters,
        "benchmarks": _benchmarks(work, folders),
        "copies": _copies(work, folders, copies),
    }


def _graded(work: Work, item: Filter, domain: str, folder: Path, limit: float) -> dict[str, Any]:
    """Histogram of all but the lowest 2 % and highest 0.5 %, kept in its end bins, and samples at the threshold."""
    parts = _training(work, domain)
    some = np.concatenate([_every(read(folder, part.stem, item.column), 200_000 // len(parts) + 1) for part in parts])
    low, high = np.quantile(some[~np.isnan(some)], [0.02, 0.995])
    low, high = min(low, limit), max(high, limit)
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    counts = np.zeros(BINS, np.int64)
    for part in parts:
        scores = np.asarray(read(folder, part.stem, item.column))
        counts += np.histogram(np.clip(scores[~np.isnan(scores)], edges[0], edges[-1]), edges)[0]
    rows = list(_looked_at(parts, folder, item.column))
    below = sorted((row for row in rows if row[2] < limit), key=lambda row: -row[2])[:SAMPLES]
    above = sorted((row for row in rows if row[2] >= limit), key=lambda row: row[2])[:SAMPLES]
    lowest = sorted(rows, key=lambda row: row[2])[:2]
    highest = sorted(rows, key=lambda row: -row[2])[:2]
    texts = _texts(work, [*below, *above, *lowest, *highest])
    return {
        "edges": [round(float(edge), 6) for edge in edges],
        "counts": counts.tolist(),
        "samples": {
            "just dropped": [texts[row[0].stem, row[1]] | {"score": row[2]} for row in below],
            "just kept": [texts[row[0].stem, row[1]] | {"score": row[2]} for row in above],
            "the worst": [texts[row[0].stem, row[1]] | {"score": row[2]} for row in lowest],
            "the best": [texts[row[0].stem, row[1]] | {"score": row[2]} for row in highest],
        },
    }


def _ruled(work: Work, item: Filter, domain: str, folder: Path, limit: float) -> dict[str, Any]:
    """How often each rule was the first that a document broke, with documents that did."""
    reasons: Sequence[str] = item.module.open_scorer(**item.arguments).reasons
    counts = np.zeros(len(reasons), np.int64)
    parts = _training(work, domain)
    for part in parts:
        scores = np.asarray(read(folder, part.stem, item.column))
        counts += np.bincount(-scores[scores < limit].astype(np.int64), minlength=len(reasons))
    rows = list(_looked_at(parts, folder, item.column))
    broken = sorted((rule for rule in range(1, len(reasons)) if counts[rule]), key=lambda rule: -counts[rule])
    chosen = {reasons[rule]: [row for row in rows if row[2] == -rule][:2] for rule in broken[:5]}
    chosen["kept"] = _every([row for row in rows if row[2] >= limit], SAMPLES)
    texts = _texts(work, [row for group in chosen.values() for row in group])
    return {
        "rules": {reasons[rule]: int(counts[rule]) for rule in broken},
        "samples": {name: [texts[row[0].stem, row[1]] for row in group] for name, group in chosen.items() if group},
    }


def _benchmarks(work: Work, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Documents that have words of each benchmark file, and some of them."""
    counts: dict[str, int] = dict.fromkeys((path.name for path in work.benchmarks), 0)
    rows: Rows = []
    if work.benchmarks:
        for part in work.parts:
            if part.split == "train":
                found = read(folders[part.domain], part.stem, "benchmark")
                for place, path in enumerate(work.benchmarks, start=1):
                    counts[path.name] += int((found == place).sum())
                if len(rows) < SAMPLES:
                    dropped = np.flatnonzero(read(folders[part.domain], part.stem, "why") == BENCHMARK)
                    rows += [(part, int(row), float(found[row])) for row in dropped[:1]]
    texts = _texts(work, rows)
    names = [path.name for path in work.benchmarks]
    samples = [texts[row[0].stem, row[1]] | {"benchmark": names[int(row[2]) - 1]} for row in rows]
    return {"counts": {name: count for name, count in counts.items() if count}, "files": names, "samples": samples}


def _copies(work: Work, folders: Mapping[str, Path], copies: Copies) -> list[dict[str, Any]]:
    """Pairs of a copy that was dropped and what stays; near ones first, since exact ones are no news."""
    pairs: list[tuple[bool, bool, int, tuple[Part, int, float], tuple[Part, int, float]]] = []
    for part, row, first, place in copies:
        near = read(folders[part.domain], part.stem, "why")[row] == NEAR
        pairs.append((not near, part.domain == first.domain, len(pairs), (part, row, 0.0), (first, place, 0.0)))
    chosen = [pair[3:] for pair in sorted(pairs, key=lambda pair: pair[:3])[: 2 * SAMPLES]]
    texts = _texts(work, [row for pair in chosen for row in pair])
    return [
        {"dropped": texts[copy[0].stem, copy[1]], "stays": texts[first[0].stem, first[1]]} for copy, first in chosen
    ]


def _training(work: Work, domain: str) -> list[Part]:
    return [part for part in work.parts if part.domain == domain and part.split == "train"]


def _every(rows: Any, count: int) -> Any:
    """`count` of `rows`, evenly."""
    return rows[:: max(1, len(rows) // max(count, 1))][:count]


def _looked_at(parts: Sequence[Part], folder: Path, column: str) -> Iterator[tuple[Part, int, float]]:
    left = _LOOKED_AT
    for part in parts:
        scores = np.asarray(read(folder, part.stem, column))[:left]
        left -= len(scores)
        yield from ((part, int(row), float(scores[row])) for row in np.flatnonzero(~np.isnan(scores)))
        if left <= 0:
            return


def _texts(work: Work, rows: Rows) -> dict[tuple[str, int], dict[str, Any]]:
    """The documents again, from their files: (file, row) → domain, where, beginning of the text."""
    wanted: dict[Part, set[int]] = {}
    for part, row, _ in rows:
        wanted.setdefault(part, set()).add(row)
    found = {}
    for part, places in wanted.items():
        for row, document in enumerate(documents_of(work, part)):
            if row in places:
                text = re.sub(r"\n\s*\n", "\n", document.text[:EXCERPT].strip())
                where = document.where.rpartition("/")[2]
                found[part.stem, row] = {
                    "domain": part.domain,
                    "where": where,
                    "bytes": document.num_bytes,
                    "text": text,
                }
                if row == max(places):
                    break
    return found


def can_draw() -> bool:
    """Whether the page can be written: jinja2 comes with `prismoe[report]`."""
    return find_spec("jinja2") is not None


def page(found: Mapping[str, Any]) -> str:
    """The HTML page: no script, nothing from elsewhere, every text of a document escaped."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["size"] = _size
    environment.filters["count"] = _count
    template = environment.from_string(
        files("prismoe.data.sift").joinpath("audit.html.jinja").read_text(encoding="utf-8")
    )
    colours = {name: f"c{place % 8}" for place, name in enumerate(found["reasons"], start=1)}
    seen = [name for name in found["reasons"] if any(name in row["dropped"] for row in found["domains"])]
    return template.render(**{**found, "reasons": seen}, totals=_totals(found["domains"]), colours=colours, bars=_bars)


def _totals(domains: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = ("documents", "bytes", "kept_documents", "kept_bytes")
    totals = {name: sum(row[name] for row in domains) for name in names}
    sized = [row for row in domains if row["bytes_per_token"]]
    lost = sum((row["bytes"] - row["kept_bytes"]) / row["bytes_per_token"] for row in sized)
    return totals | {"tokens_dropped": round(lost)}


def _bars(row: Mapping[str, Any], width: float, height: float) -> dict[str, Any]:
    """Places of a histogram's bars, of its threshold, and of some labels, in a drawing of this size."""
    edges, counts = np.array(row["edges"]), np.array(row["counts"])
    scale = width / (edges[-1] - edges[0])
    top = max(int(counts.max()), 1)
    ticks = _ticks(float(edges[0]), float(edges[-1]))
    return {
        "bars": [
            {
                "x": round(float((edge - edges[0]) * scale), 2),
                "y": round(height * (1 - count / top), 2),
                "height": round(height * count / top, 2),
                "dropped": bool(edge + (edges[1] - edges[0]) / 2 < row["threshold"]),
                "title": f"{count} documents from {edge:.3g} to {edge + edges[1] - edges[0]:.3g}",
            }
            for edge, count in zip(edges[:-1], counts.tolist(), strict=True)
        ],
        "width": round(width / len(counts) - 0.6, 2),
        "limit": round(float((row["threshold"] - edges[0]) * scale), 2),
        "ticks": [(round(float((tick - edges[0]) * scale), 2), f"{tick:g}".replace("-", "−")) for tick in ticks],
        "top": top,
    }


def _ticks(low: float, high: float) -> npt.NDArray[np.float64]:
    raw = (high - low) / 5
    step = 10 ** np.floor(np.log10(raw))
    step *= min((factor for factor in (1, 2, 5, 10) if factor * step >= raw), default=10)
    ticks: npt.NDArray[np.float64] = np.round(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step, 10)
    return ticks


def _size(number: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.1f} {name}"
    return f"{number:.0f} B"


def _count(number: float) -> str:
    """Two or three digits: an estimate has no more."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.{0 if number >= 100 * unit else 1}f} {name}"
    return f"{number:.0f}"
