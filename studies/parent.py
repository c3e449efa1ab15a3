"""How the study's parent was made: tokenizer, config, training from scratch on the seven domains, bf16 weights.

    python -m studies.parent --corpora shared/corpora --out runs/study-parent     # three hours on one core, then
    cp runs/study-parent/shipped/* studies/parent/

`torchrun --nproc-per-node 2 -m studies.parent …` is for two cores. A stopped run goes on with the same command, on one
or on two. The weights here were made with the versions in `parent/training.json`, which has the curve too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import prismoe
from examples.train_parent import CONFIG as SMALLER
from examples.train_parent import ship, train_tokenizer
from prismoe.data.reader import read_documents
from prismoe.train.metrics import read_metrics

DOMAINS = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")
VOCAB_SIZE = 4608
CONFIG = SMALLER | {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 768,  # the FFNs are 64.3 % of 4.1 million parameters (LLaMA-2-7B: 64.2 %)
    "num_hidden_layers": 6,
    "num_attention_heads": 3,  # few wide heads: half the time of a step would go to attention with six of 32
    "num_key_value_heads": 1,
    "head_dim": 64,
}
TOKENIZER_TEXT = 3_000_000
TRAINING = prismoe.PretrainConfig(
    model="dense", init="random", tokens=61_440_000, batch_size=32, micro_batch_size=16, seq_len=256, lr=3e-3,
    warmup_steps=300, min_lr_ratio=0.05, precision="bf16", keep_memory=True, threads=1, eval_every=750,
    eval_tokens=32_768, save_every=150, max_epochs=8,
)  # fmt: skip
"""Domains in proportion to their size: each is read four to five times."""


def beginning(files: list[Path]) -> str:
    """The first `TOKENIZER_TEXT` characters of the documents."""
    parts: list[str] = []
    for file in files:
        for document in read_documents(file):
            parts.append(document.text)
            if sum(map(len, parts)) >= TOKENIZER_TEXT:
                return "".join(parts)[:TOKENIZER_TEXT]
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    out: Path = args.out

    start = out / "start"  # a folder with a config and a tokenizer, and no weights yet
    start.mkdir(parents=True, exist_ok=True)
    if not (start / "tokenizer.json").exists():
        texts = [beginning(sorted((args.corpora / name).glob("train-*"))) for name in DOMAINS]
        train_tokenizer(texts, start, VOCAB_SIZE)
    (start / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    sources = {
        name: prismoe.DomainSource(
            train=(str(args.corpora / name / "train-*"),), heldout=(str(args.corpora / name / "heldout*"),)
        )
        for name in DOMAINS
    }
    prepared = prismoe.prepare(sources, tokenizer=start, out=out / "data")
    trained = prismoe.pretrain(
        start,
        TRAINING,
        domains=[domain.folder for domain in prepared.domains],
        out=out / "train",
        on_progress=lambda what, done, total: print(f"{what} {done}/{total}", flush=True) if done % 20 == 0 else None,
    )
    if trained is not None:  # the first process of several
        ship(out, trained, CONFIG)
        note_curve(out)


def note_curve(out: Path) -> None:
    """Held-out losses of every evaluation into training.json."""
    evals = [line for line in read_metrics(out / "train" / "metrics.jsonl") if line["event"] == "eval"]
    curve = {"step": [line["step"] for line in evals]}
    curve |= {name: [round(line["heldout"][name]["loss"], 4) for line in evals] for name in DOMAINS}
    path = out / "shipped" / "training.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {"heldout_curve": curve}, indent=2) + "\n")


if __name__ == "__main__":
    main()
