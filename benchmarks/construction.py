"""Perplexity before any training: every construction × router initialisation × scale, beside the static control.

    python benchmarks/construction.py --shared ../shared --work DIR

Every number comes through the real chain: prepare, calibrate, make_plan, convert, evaluate with the stock class. One
file of results for each model and seed lies in DIR; the same command goes on after a stop, and writes
docs/construction.md and docs/construction.json from what is there.
"""

# Threads are pinned before torch loads.
# ruff: noqa: E402
from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ |= {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import argparse
import json
import math
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from prismoe import Checkpoint, DomainSource, PrismoeError, account, convert, evaluate, make_plan, plan_shape, prepare
from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.calibrate.prompts import prompt_states
from prismoe.data.reader import read_documents
from prismoe.folder import versions, write_atomic, write_json_atomic
from prismoe.verify import verify

OWN = "tinystories"  # what both models were trained on
DOMAINS = (OWN, "arxiv", "books", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")
ROUTERS = ("auto", "random", "zero", "centroid", "prompts", "regressed")
SCALES = ("none", "paper", "mean", "norm", "measured")
TRAIN_CHARACTERS, HELD_CHARACTERS, HELD_TOKENS, CALIBRATION_TOKENS = 2000, 480, 1200, 8192
QUANTITIES = ("activation", "importance", "marks", "coactivation", "inputs", "scores")


@dataclass(frozen=True)
class Size:
    """A model at one share of active FFN neurons. `inter` are E, K and shared neurons of the construction with an
    always-on expert, the largest that is not above the share (its three numbers cannot meet every share).
    """

    model: str
    percent: int
    experts: int
    top_k: int
    inter: tuple[int, int, int]


# 172 = 4 · 43 neurons, 352 = 8 · 44.
SIZES = (
    Size("stories260K", 50, 4, 2, (4, 1, 56)),
    Size("stories260K", 25, 4, 1, (8, 1, 20)),
    Size("babyllama105", 50, 8, 4, (8, 3, 64)),
    Size("babyllama105", 25, 8, 2, (8, 1, 48)),
)
METHODS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "clustering": {"method": "clustering"},
    "coactivation": {"method": "coactivation"},
    "gradient independent": {"method": "gradient", "mode": "independent"},
    "gradient inner": {"method": "gradient", "mode": "inner"},
    "gradient inter": {"method": "gradient", "mode": "inter"},
    "router_first": {"method": "router_first"},
}
CONTROLS = ("random", "activation", "gradient")


def sizes(model: str) -> list[Size]:
    return [size for size in SIZES if size.model == model]


def combinations(size: Size) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, arguments of make_plan, data clusters) of everything that is measured at one size."""
    for by in CONTROLS:
        yield f"prune|{by}", {"method": "prune", "by": by, "keep": size.percent / 100}, size.experts
    for name, arguments in METHODS.items():
        experts, top_k, shared = size.inter if arguments.get("mode") == "inter" else (size.experts, size.top_k, 0)
        fixed = {**arguments, "num_experts": experts, "top_k": top_k, **({"shared": shared} if shared else {})}
        own = arguments["method"] == "router_first"
        for router in ROUTERS if own else ROUTERS[1:]:
            yield f"{name}|{router}|paper", {**fixed, "router": router}, experts
        for scale in SCALES:
            if scale != "paper":  # the methods' own, measured above
                router = "auto" if own else "random"
                yield f"{name}|{router}|{scale}", {**fixed, "router": router, "scale": scale}, experts


def texts(shared: Path, work: Path) -> dict[str, DomainSource]:
    """The beginnings of a few documents of each domain, so that many documents count and none counts alone."""
    found = {}
    for name in DOMAINS:
        for split, file, count, length in (
            ("train", "train-00000-of-00002", 30, TRAIN_CHARACTERS),
            ("heldout", "heldout", 16, HELD_CHARACTERS),
        ):
            documents = [d.text for d in read_documents(shared / "corpora" / name / f"{file}.jsonl.zst")]
            kept = documents[:: math.ceil(len(documents) / count)]
            lines = "".join(json.dumps({"text": text[:length]}) + "\n" for text in kept)
            write_atomic(work / "text" / f"{name}.{split}.jsonl", lines.encode())
        paths = [str(work / "text" / f"{name}.{split}.jsonl") for split in ("train", "heldout")]
        found[name] = DomainSource(train=(paths[0],), heldout=(paths[1],))
    return found


def prompts(shared: Path, experts: int) -> list[list[str]]:
    """For each expert the first sentences of two documents from every domain that falls to it."""
    groups: list[list[str]] = [[] for _ in range(experts)]
    for number, name in enumerate(DOMAINS):
        documents = read_documents(shared / "corpora" / name / "train-00001-of-00002.jsonl.zst")
        groups[number % experts] += [d.text[:200] for d in islice(documents, 2)]
    return groups


def measure(model: str, seed: int, *, shared: Path, work: Path) -> dict[str, Any]:
    """Losses in nats a token by domain, for each size of one model under one seed."""
    started, cpu = time.monotonic(), time.process_time()
    source = Checkpoint.open(shared / "models" / model)
    place = work / f"{model}-{seed}"
    (place / "text").mkdir(parents=True, exist_ok=True)
    prepare(texts(shared, place), tokenizer=source.folder, out=place / "data")
    domains = [place / "data" / name for name in DOMAINS]
    seq_len = min(256, source.family.max_positions)
    found: dict[str, Any] = {"model": model, "seed": seed, "sizes": {}}
    for size in sizes(model):
        folders: dict[str, Any] = {"dense": source}
        active, refused, verified = {}, {}, 0
        for name, arguments, clusters in combinations(size):
            statistics_of = place / f"calibration-{clusters}"
            if not statistics_of.is_dir():
                config = CalibrateConfig(
                    quantities=QUANTITIES, clusters=clusters, max_tokens=CALIBRATION_TOKENS, seq_len=seq_len, seed=seed
                )
                calibrate(source, config, domains=domains, out=statistics_of)
                prompt_states(source, prompts(shared, clusters), out=place / f"prompts-{clusters}.safetensors")
            if arguments.get("router") == "prompts":
                arguments["prompt_states"] = str(place / f"prompts-{clusters}.safetensors")
            target = "dense" if "prune" in name else "granitemoeshared" if "shared" in arguments else "mixtral"
            out = place / f"{size.percent}-{len(folders) + len(refused)}"
            try:
                plan = make_plan(source, seed=seed, calibration=statistics_of, **arguments)
                convert(source, plan, target=target, out=out)
            except PrismoeError as error:
                refused[name] = str(error).replace(str(place), "")
                continue
            if seed == 0 and (name.endswith(("|paper", "|activation")) and ("prune" in name or "random|" in name)):
                verified += verify(out, source=source, tokens=32).passed
            counted = account(source.family, plan_shape(plan), target=target)
            active[name.split("|")[0]] = round(counted.ffn_active_percent, 1)
            folders[name] = out
        scores = evaluate(folders, domains, seq_len=seq_len, max_tokens=HELD_TOKENS, batch_size=64, threads=1)
        losses = {name: [round(scores.of(name, domain).loss, 4) for domain in DOMAINS] for name in folders}
        found["tokens"] = [scores.of("dense", domain).scored_tokens for domain in DOMAINS]
        rows = {"losses": losses, "active": active, "refused": refused, "verified": verified}
        found["sizes"][str(size.percent)] = rows
    shutil.rmtree(place)
    return found | {"seconds": round(time.monotonic() - started), "cpu_seconds": round(time.process_time() - cpu)}


class Cells:
    """Perplexities of one model at one size over the seeds, as text."""

    def __init__(self, parts: list[dict[str, Any]], percent: int) -> None:
        self.rows = [part["sizes"][str(percent)] for part in parts]

    def spread(self, name: str, domains: slice) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds of exp(mean loss over `domains`); None where it was refused."""
        found = [row["losses"].get(name) for row in self.rows]
        if None in found:
            return None
        values = [math.exp(statistics.fmean(losses[domains])) for losses in found]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0

    def text(self, name: str) -> str:
        both = [self.spread(name, slice(0, 1)), self.spread(name, slice(1, None))]
        return " · ".join("refused" if value is None else number(*value) for value in both)

    def best(self, names: list[str], domains: slice) -> tuple[str, float]:
        found = {name: value[0] for name in names if (value := self.spread(name, domains)) is not None}
        name = min(found, key=lambda name: found[name])
        return name, found[name]


def number(mean: float, spread: float) -> str:
    digits = 0 if mean >= 1000 else 1 if mean >= 100 else 2
    return f"{mean:.{digits}f} ± {spread:.{digits}f}" if spread else f"{mean:.{digits}f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def section(size: Size, parts: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The tables of one model at one size, and a row of the summary."""
    cells = Cells(parts, size.percent)
    active = cells.rows[0]["active"]
    by_router, by_scale = [], []
    for name in METHODS:
        label = f"{name} ({active[name]:g} %)"
        own = name == "router_first"
        routers = [cells.text(f"{name}|{router}|paper") if own or router != "auto" else "" for router in ROUTERS]
        by_router.append([label, *routers[1:], routers[0]])
        base = "auto" if own else "random"
        by_scale.append([label, *(cells.text(f"{name}|{base}|{scale}") for scale in SCALES)])
    fixed = [[f"prune by {by} ({size.percent} %)", cells.text(f"prune|{by}")] for by in CONTROLS]
    text = "\n\n".join(
        [
            f"## {size.model}, {size.percent} % of the FFN active",
            f"{size.experts} experts, top-{size.top_k}; gradient inter: {size.inter[0]} experts, top-{size.inter[1]}, "
            f"{size.inter[2]} shared neurons.",
            table(["beside", "perplexity"], [["dense parent", cells.text("dense")], *fixed]),
            "Method × router initialisation, scale E/K:",
            table(["method", *ROUTERS[1:], "the method's own"], by_router),
            "Method × scale, the method's default router (random; router_first has its own):",
            table(["method", *SCALES], by_scale),
        ]
    )
    names = [name for name in cells.rows[0]["losses"] if name != "dense" and "prune" not in name]
    controls, summary = [f"prune|{by}" for by in CONTROLS], [size.model, f"{size.percent} %"]
    for domains in (slice(0, 1), slice(1, None)):
        dense = cells.spread("dense", domains)
        control, mixture = cells.best(controls, domains), cells.best(names, domains)
        assert dense is not None
        summary += [number(dense[0], 0)]
        summary += [f"{number(value, 0)} ({name.replace('|', ', ')})" for name, value in (control, mixture)]
        better = sum((value := cells.spread(name, domains)) is not None and value[0] < control[1] for name in names)
        summary += [f"{better} of {len(names)}"]
    return text, summary


def document(parts: list[dict[str, Any]], reading: str) -> str:
    bodies, summaries = [], []
    for size in SIZES:
        own = [part for part in parts if part["model"] == size.model]
        if own:
            text, summary = section(size, own)
            bodies.append(text)
            summaries.append(summary)
    rows = [row for part in parts for row in part["sizes"].values()]
    refused = sorted({f"- `{name}`: {why}" for row in rows for name, why in row["refused"].items()})
    seeds = {part["model"]: [p["seed"] for p in parts if p["model"] == part["model"]] for part in parts}
    scored = {part["model"]: f"{min(part['tokens'])} – {max(part['tokens'])}" for part in parts}
    head = f"""# Perplexity before any training

Written by `python benchmarks/construction.py --shared ../shared --work DIR`; [construction.json](construction.json) has
the loss of every model, seed and domain.

- Each cell: perplexity on TinyStories, which both were trained on · on the seven other domains (exp of the mean
  of their losses a token). Mean ± standard deviation over seeds; lower is better. A seed draws all: split, router
  rows, calibration text. Seeds: {listed(seeds)}.
- The held-out text is the same for all: the first {HELD_CHARACTERS} characters of documents spread over each domain's
  file. Scored tokens a domain: {listed(scored)}. That is little text: differences of a few percent mean nothing.
- Calibration: {CALIBRATION_TOKENS} tokens, all eight domains in equal parts, as many text clusters as experts.
- `prompts`: two documents' first 200 characters from each domain that falls to an expert.
- `prune` is the static control: one smaller dense FFN, no router. In brackets: what is active of the FFN.
- Upcycled copies activate a whole FFN each, so they cannot be here: they equal the dense row.
- {sum(row["verified"] for row in rows)} conversions (of the first seed: each method with drawn rows and scale E/K, a
  control) went through `verify` and passed.
- {platform.machine()}, {os.cpu_count()} cores, one thread, {sum(part["cpu_seconds"] for part in parts)} CPU-seconds;
  Python {platform.python_version()}, {listed(versions())}.

## In short

"""
    columns = ["model", "active"]
    for where in ("TinyStories", "seven"):
        columns += [f"{where}: dense", "best control", "best mixture", "mixtures better than the control"]
    ending = "\n\nRefused:\n\n" + "\n".join(refused) if refused else ""
    return head + table(columns, summaries) + "\n\n" + reading + "\n\n" + "\n\n".join(bodies) + ending + "\n"


def listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {str(value).strip('[]')}" for name, value in sorted(found.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and corpora/")
    parser.add_argument("--work", type=Path, required=True, help="a folder for results and conversions")
    parser.add_argument("--models", default="stories260K,babyllama105")
    parser.add_argument("--seeds", default="0,1,2", help="those to run; the tables show all that are there")
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    for seed in map(int, arguments.seeds.split(",")):
        for model in models:
            part = arguments.work / f"{model}-{seed}.json"
            if not part.is_file():
                write_json_atomic(part, measure(model, seed, shared=arguments.shared, work=arguments.work))
                print(f"{part.name} is there", flush=True)
    parts = [json.loads(path.read_bytes()) for path in sorted(arguments.work.glob("*-[0-9]*.json"))]
    reading = ROOT / "docs" / "construction-reading.md"
    note = reading.read_text().strip() if reading.is_file() else ""
    write_atomic(
        ROOT / "docs" / "construction.md",
        document(parts, note).encode(),
    )
    line = json.dumps({"domains": DOMAINS, "parts": parts}, separators=(",", ":")).replace('],"', '],\n"')
    write_atomic(ROOT / "docs" / "construction.json", (line + "\n").encode())


if __name__ == "__main__":
    main()
