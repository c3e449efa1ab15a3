"""Filters beside their peers on the same documents: rules and MinHash against datatrove, a classifier against fastText.

    python benchmarks/filter.py corpus.jsonl.zst … --peer-python PEERS/bin/python

The peers live in an environment of their own (datatrove[processing], spacy, fasttext) that `--peer-python` names; what
is missing there is printed as "peer missing". CPU seconds of one thread, the smaller of two rounds, ours and the peer's
in turns; decisions are compared document by document.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.data.filters import c4, fineweb, gopher, linear
from prismoe.data.reader import read_documents
from prismoe.data.sift.duplicates import BANDS, first_of_each, minhash_bands
from prismoe.data.words import Batch

RULES = {"gopher": gopher, "c4": c4, "fineweb": fineweb}
GOALS = {"rules": 20.0, "minhash": 10.0, "classifier": 1.0, "on ids": 10.0}
# "on ids": the classifier scores texts whose words are numbers already, as they are after any other filter.

PEER = """
import json, sys, time, os
texts, what = json.load(open(sys.argv[1])), sys.argv[2]
clock, out = time.process_time, {}
if what == "rules":
    from datatrove.data import Document
    from datatrove.pipeline.filters import (
        C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter)
    from datatrove.utils.text import split_into_words
    split_into_words("warm up")
    groups = {"gopher": (GopherQualityFilter(), GopherRepetitionFilter()), "c4": (C4QualityFilter(),),
              "fineweb": (FineWebQualityFilter(),)}
    seconds, kept = 0.0, {name: [] for name in groups}
    for text in texts:
        for name, filters in groups.items():
            start = clock()  # like ours, every rule set looks at every document, and words are split once for all
            kept[name].append(all([f.filter(Document(text=text, id="")) is True for f in filters]))
            seconds += clock() - start
    out = {"seconds": seconds, "kept": kept}
elif what == "minhash":
    from datatrove.pipeline.dedup import MinhashDedupSignature
    step = MinhashDedupSignature(output_folder=sys.argv[3])
    step.get_shingles("warm up for the first time")
    start, bands = clock(), []
    for text in texts:
        shingles = step.get_shingles(text)
        bands.append([hash(tuple(b)) for b in step.get_signature(shingles)] if shingles.size else None)
    seconds = clock() - start
    first, parent = [{} for _ in range(14)], list(range(len(texts)))
    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]; i = parent[i]
        return i
    for i, row in enumerate(bands):
        for k, band in enumerate(row or ()):
            a, b = root(first[k].setdefault(band, i)), root(i)
            parent[max(a, b)] = min(a, b)
    out = {"seconds": seconds, "kept": [root(i) == i for i in range(len(texts))]}
else:
    import fasttext
    with open(sys.argv[3] + "/train.txt", "w") as file:
        for i, text in enumerate(texts[:1000]):
            file.write(f"__label__{i % 2} " + " ".join(text.split()) + "\\n")
    model = fasttext.train_supervised(sys.argv[3] + "/train.txt", dim=100, wordNgrams=2, bucket=200000, epoch=1,
                                      thread=1, verbose=0)
    lines = [" ".join(text.split()) for text in texts]
    model.f.multilinePredict(lines[:10], 1, 0.0, "strict")
    start = clock()
    for first in range(0, len(lines), 500):
        model.f.multilinePredict(lines[first : first + 500], 1, 0.0, "strict")
    out = {"seconds": clock() - start}
json.dump(out, open(sys.argv[4], "w"))
"""


def peer(python: Path | None, texts: Path, what: str, folder: Path) -> dict[str, Any] | None:
    """What the peer measured of itself; None where it is not there."""
    if python is None:
        return None
    found = folder / "found.json"
    done = subprocess.run([str(python), "-c", PEER, str(texts), what, str(folder), str(found)], capture_output=True)
    if done.returncode:
        return None
    result: dict[str, Any] = json.loads(found.read_text())
    return result


def batches(texts: list[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    size = 0
    for text in texts:
        parts[-1].append(text)
        size += len(text)
        if size > 1 << 20:
            parts.append([])
            size = 0
    return [part for part in parts if part]


def measured(work: Callable[[Batch], Any], texts: list[str], *, cut: bool) -> tuple[float, list[Any]]:
    """CPU seconds and results; words are cut anew, with nothing known of the text before, unless they are `cut`."""
    from prismoe.data import words

    words._known = words._Known()
    found: list[Any] = []
    seconds = 0.0
    for part in batches(texts):
        batch = Batch(part)
        if cut:
            batch.keys  # noqa: B018
        start = time.process_time()
        found.append(work(batch))
        seconds += time.process_time() - start
    return seconds, found


def rules(batch: Batch) -> dict[str, Any]:
    return {name: module.open_scorer().score(batch) > 0 for name, module in RULES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("text", nargs="+", type=Path)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--megabytes", type=float, default=24)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    texts: list[str] = []
    size = 0
    share = arguments.megabytes * 1e6 / len(arguments.text)
    for path in arguments.text:
        taken = 0
        for document in read_documents(path):
            if taken + document.num_bytes <= share:
                texts.append(document.text)
                taken += document.num_bytes
        size += taken
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sample = folder / "texts.json"
        sample.write_text(json.dumps(texts))
        half = len(texts) // 2
        linear.train_filter(texts[: min(half, 500)], texts[half : half + 500], out=folder / "linear")
        scorer = linear.open_scorer(model=str(folder / "linear"))
        works = {"rules": rules, "minhash": minhash_bands, "classifier": scorer.score, "on ids": scorer.score}
        for what, work in works.items():
            ours, theirs, found, other = [], [], [], None
            for _ in range(arguments.rounds):
                seconds, found = measured(work, texts, cut=what == "on ids")
                ours.append(seconds)
                other = peer(arguments.peer_python, sample, what, folder)
                if other is not None:
                    theirs.append(other["seconds"])
            row: dict[str, Any] = {"ours_mb_s": size / 1e6 / min(ours), "goal": GOALS[what]}
            if other is not None:
                row |= {"peer_mb_s": size / 1e6 / min(theirs), "ratio": min(theirs) / min(ours)}
                row["equal"] = equal(what, found, other)
            rows[what] = row
            if not arguments.json:
                print(line(what, row), flush=True)
    if arguments.json:
        print(json.dumps({"bytes": size, "documents": len(texts), **rows}, indent=2))


def equal(what: str, found: list[Any], other: dict[str, Any]) -> dict[str, float]:
    """Share of documents with the same decision."""
    if what == "rules":
        return {
            name: float((np.concatenate([part[name] for part in found]) == np.array(other["kept"][name])).mean())
            for name in RULES
        }
    if what == "minhash":
        bands = np.concatenate(found)
        copies, _ = first_of_each(BANDS, lambda k: iter([(bands[:, k], np.arange(len(bands)))]), count=len(bands))
        kept = ~np.isin(np.arange(len(bands)), copies)
        return {"copies": float((kept == np.array(other["kept"])).mean())}
    return {}


def line(what: str, row: dict[str, Any]) -> str:
    text = f"{what:12} ours {row['ours_mb_s']:6.2f} MB a CPU second"
    if "ratio" not in row:
        return f"{text}   peer missing"
    verdict = "met" if row["ratio"] >= row["goal"] and all(v >= 0.995 for v in row["equal"].values()) else "MISSED"
    same = ", ".join(f"{name} {100 * share:.2f} %" for name, share in row["equal"].items())
    text += f"   peer {row['peer_mb_s']:6.2f}   ratio {row['ratio']:5.1f} (goal {row['goal']:.0f}: {verdict})"
    return text + (f"   equal decisions: {same}" if same else "")


if __name__ == "__main__":
    main()
