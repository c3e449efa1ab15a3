"""Perplexity before any training: every construction × router initialisation × scale, beside the static control.

    python benchmarks/construction.py --shared ../shared --work DIR

Every number comes through the real chain: prepare, calibrate, make_plan, convert, evaluate with the stock class. DIR
has one file of results for each model, share of active neurons and seed, saved after every method: the same command
goes on after a stop, several with other --models or --seeds may run side by side, and each writes docs/construction.*
from what is there.
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
import shutil
import sys
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import construction_table
from construction_table import ROUTERS, SCALES

from prismoe import (
    Checkpoint,
    DomainSource,
    Plan,
    PrismoeError,
    account,
    convert,
    evaluate,
    make_plan,
    plan_shape,
    prepare,
)
from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.calibrate.prompts import prompt_states
from prismoe.data.reader import read_documents
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.folder import write_atomic, write_json_atomic
from prismoe.plan import Origin
from prismoe.verify import verify

OWN = "tinystories"  # what both models were trained on
DOMAINS = (OWN, "arxiv", "books", "c4", "commoncrawl", "github", "stackexchange", "wikipedia")
# Held-out text: the first 127 tokens of each document, so that all windows are of one length and many documents count.
SEQ_LEN, HELD_DOCUMENTS, OWN_DOCUMENTS = 128, 8, 32
TRAIN_CHARACTERS, CALIBRATION_TOKENS = 2000, 8192
QUANTITIES = ("activation", "importance", "marks", "coactivation", "inputs", "scores")
NOWHERE = Origin(method="", arguments={}, seed=0, source="")


@dataclass(frozen=True)
class Size:
    """A model at one share of active FFN neurons. `inter` are E, K and shared neurons of the construction with an
    always-on expert, the largest that is not above the share (its three numbers cannot meet every share).
    """

    model: str
    percent: int
    experts: int
    top_k: int
    inter: tuple[int, int, int] = (0, 0, 0)


# 172 = 4 · 43 neurons, 352 = 8 · 44.
SIZES = (
    Size("stories260K", 50, 4, 2, (4, 1, 56)),
    Size("stories260K", 25, 4, 1, (8, 1, 20)),
    Size("babyllama105", 50, 8, 4, (8, 3, 64)),
    Size("babyllama105", 25, 8, 2, (8, 1, 48)),
    Size("stories260K", 100, 4, 1),
    Size("babyllama105", 100, 8, 1),
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
# Copies run at least one whole FFN a token: their rows are 100 %.
COPIES: dict[str, dict[str, Any]] = {
    "upcycle": {},
    "upcycle noise=0.01": {"noise": 0.01},
    "upcycle drop=0.5": {"drop": 0.5},
    "upcycle granularity=2": {"granularity": 2, "top_k": 2, "permute": True},
}

Cells = dict[str, dict[str, Any]]


def groups(size: Size) -> Iterator[tuple[str, Cells]]:
    """(method, arguments of make_plan by the name of the cell) of everything that is measured at one size."""
    if size.percent == 100:
        fixed = {"method": "upcycle", "num_experts": size.experts, "top_k": size.top_k}
        yield "upcycle", {name: {**fixed, **arguments} for name, arguments in COPIES.items()}
        return
    yield "prune", {f"prune|{by}": {"method": "prune", "by": by, "keep": size.percent / 100} for by in CONTROLS}
    for name, arguments in METHODS.items():
        experts, top_k, shared = size.inter if arguments.get("mode") == "inter" else (size.experts, size.top_k, 0)
        fixed = {**arguments, "num_experts": experts, "top_k": top_k, **({"shared": shared} if shared else {})}
        own = arguments["method"] == "router_first"
        yield (
            name,
            {
                f"{name}|{router}|{scale}": {**fixed, "router": router, "scale": scale}
                for router in (ROUTERS if own else ROUTERS[:-1])
                for scale in (SCALES if router != "from" else ("paper", "measured"))
            },
        )


def cut(text: str, tokenizer: DocumentTokenizer) -> str | None:
    """The beginning of `text` that is exactly as many tokens as a window scores, or None where there is none."""

    def count(length: int) -> int:
        return len(tokenizer.encode([text[:length]])[0]) - 1 - (tokenizer.start_token is not None)

    length = bisect_left(range(len(text)), SEQ_LEN - 1, key=count)
    return text[:length] if length < len(text) and count(length) == SEQ_LEN - 1 else None


def texts(shared: Path, out: Path, tokenizer: DocumentTokenizer) -> dict[str, DomainSource]:
    """Calibration text and held-out text of each domain: beginnings of documents spread over its files."""
    found = {}
    for name in DOMAINS:
        documents = [d.text for d in read_documents(shared / "corpora" / name / "train-00000-of-00002.jsonl.zst")]
        train = [text[:TRAIN_CHARACTERS] for text in documents[:: math.ceil(len(documents) / 30)]]
        documents = [d.text for d in read_documents(shared / "corpora" / name / "heldout.jsonl.zst")]
        wanted = OWN_DOCUMENTS if name == OWN else HELD_DOCUMENTS
        held = [part for text in documents[:: len(documents) // (wanted + 4)] if (part := cut(text, tokenizer))]
        held = held[:wanted]
        assert len(held) == wanted, (name, len(held))
        for split, kept in (("train", train), ("heldout", held)):
            lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
            write_atomic(out / f"{name}.{split}.jsonl", lines.encode())
        paths = [str(out / f"{name}.{split}.jsonl") for split in ("train", "heldout")]
        found[name] = DomainSource(train=(paths[0],), heldout=(paths[1],))
    return found


def prompts(shared: Path, experts: int) -> list[list[str]]:
    """For each expert the first sentences of two documents from every domain that falls to it."""
    lists: list[list[str]] = [[] for _ in range(experts)]
    for number, name in enumerate(DOMAINS):
        documents = read_documents(shared / "corpora" / name / "train-00001-of-00002.jsonl.zst")
        lists[number % experts] += [d.text[:200] for d in islice(documents, 2)]
    return lists


class Part:
    """One model at one share under one seed: its results so far, and the folders that they are made from."""

    def __init__(self, size: Size, seed: int, shared: Path, work: Path) -> None:
        self.size, self.seed, self.shared = size, seed, shared
        self.source = Checkpoint.open(shared / "models" / size.model)
        self.file = work / f"{size.model}-{size.percent}-{seed}.json"
        self.place = work / f"{size.model}-{size.percent}-{seed}"
        empty = {name: {} for name in ("losses", "errors", "same", "active", "refused")}
        start = {"model": size.model, "percent": size.percent, "seed": seed, "done": [], "verified": 0, "cpu": 0.0}
        self.found: dict[str, Any] = json.loads(self.file.read_bytes()) if self.file.is_file() else {**start, **empty}

    def run(self) -> None:
        todo = [(name, cells) for name, cells in groups(self.size) if name not in self.found["done"]]
        if not todo:
            return
        (self.place / "text").mkdir(parents=True, exist_ok=True)
        tokenizer = DocumentTokenizer.open(self.source.folder)
        prepare(
            texts(self.shared, self.place / "text", tokenizer), tokenizer=self.source.folder, out=self.place / "data"
        )
        self.domains = [self.place / "data" / name for name in DOMAINS]
        for name, cells in todo:
            cpu = time.process_time()
            self.measure(name, cells)
            self.found["cpu"] += time.process_time() - cpu
            self.found["done"].append(name)
            write_json_atomic(self.file, self.found)
            print(f"{self.file.stem}: {name}, {time.process_time() - cpu:.0f} CPU-s", flush=True)
        shutil.rmtree(self.place)

    def measure(self, name: str, cells: Cells) -> None:
        """Losses in nats a token by domain of the cells of one method; equal plans are measured once."""
        folders: dict[str, Any] = {"dense": self.source}
        if (self.place / "control").is_dir():  # first, so that differences are paired with it
            folders = {"prune|activation": self.place / "control", **folders}
        plans: dict[str, str] = {}
        target = "dense" if name == "prune" else "granitemoeshared" if name == "gradient inter" else "mixtral"
        for cell, arguments in cells.items():
            try:
                plan = self.plan(**arguments)
                kept = plans.setdefault(sha256(replace(plan, origin=NOWHERE).to_bytes()).hexdigest(), cell)
                if kept != cell:
                    self.found["same"][cell] = kept
                    continue
                out = self.place / "models" / str(len(folders))
                convert(self.source, plan, target=target, out=out)
            except PrismoeError as error:
                self.found["refused"][cell] = str(error).replace(str(self.place), "")
                continue
            folders[cell] = out
        for cell in ("prune|activation", f"{name}|random|paper", *COPIES):
            if cell in cells and (kept := self.found["same"].get(cell, cell)) in folders:
                self.found["verified"] += verify(folders[kept], source=self.source, tokens=32).passed
                counted = account(self.source.family, plan_shape(self.plan(**cells[cell])), target=target)
                self.found["active"][cell.split("|")[0]] = round(counted.ffn_active_percent, 1)
        scores = evaluate(folders, self.domains, seq_len=SEQ_LEN, batch_size=OWN_DOCUMENTS, threads=1)
        by_model: dict[str, list[Any]] = {}
        for score in scores.scores:
            by_model.setdefault(score.model, []).append(score)
        for cell, found in by_model.items():
            self.found["losses"][cell] = [round(score.loss, 4) for score in found]
            for kind in ("standard_error", "change_standard_error"):
                errors = [getattr(score, kind) for score in found]
                both = [round(errors[0], 4), round(math.hypot(*errors[1:]) / len(errors[1:]), 4)]
                self.found["errors"].setdefault(kind, {})[cell] = both
        self.found["tokens"] = [score.scored_tokens for score in by_model["dense"]]
        if name == "prune":
            folders["prune|activation"].rename(self.place / "control")
        shutil.rmtree(self.place / "models")

    def plan(self, **arguments: Any) -> Plan:
        clusters = arguments.get("num_experts", self.size.experts)
        router = arguments.get("router")
        if arguments["method"] == "upcycle":
            return make_plan(self.source, seed=self.seed, **arguments)
        if router == "prompts":
            arguments["prompt_states"] = str(self.place / f"prompts-{clusters}.safetensors")
        elif router == "from":
            arguments["router"] = f"from:{self.stored(arguments['num_experts'], arguments['top_k'])}"
        return make_plan(self.source, seed=self.seed, calibration=self.calibration(clusters), **arguments)

    def calibration(self, clusters: int) -> Path:
        """Statistics with so many text clusters; and what the prompts of so many experts are to the model."""
        out, states = self.place / f"calibration-{clusters}", self.place / f"prompts-{clusters}.safetensors"
        if not states.is_file():
            config = CalibrateConfig(
                quantities=QUANTITIES,
                clusters=clusters,
                max_tokens=CALIBRATION_TOKENS,
                seq_len=min(256, self.source.family.max_positions),
                seed=self.seed,
            )
            calibrate(self.source, config, domains=self.domains, out=out)
            prompt_states(self.source, prompts(self.shared, clusters), out=states)
        return out

    def stored(self, experts: int, top_k: int) -> Path:
        """Rows for `from:FILE`: those fitted to the experts of a random split, foreign to every other split."""
        path = self.place / f"rows-{experts}.plan"
        if not path.is_file():
            calibration = self.calibration(experts)
            made = make_plan(
                self.source,
                method="random",
                shared=self.source.family.intermediate_size % experts,
                num_experts=experts,
                top_k=top_k,
                router="regressed",
                seed=self.seed,
                calibration=calibration,
            )
            made.save(path)
        return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, required=True, help="folder with models/ and corpora/")
    parser.add_argument("--work", type=Path, required=True, help="a folder for results and conversions")
    parser.add_argument("--models", default="stories260K,babyllama105")
    parser.add_argument("--seeds", default="0,1,2", help="those to run; the tables show all that are there")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        for size in SIZES:
            if size.model in arguments.models.split(","):
                Part(size, seed, arguments.shared, arguments.work).run()
    construction_table.write(arguments.work, ROOT / "docs")


if __name__ == "__main__":
    main()
