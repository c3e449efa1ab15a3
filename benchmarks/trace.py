"""What tracing costs over a plain forward pass on the same tokens, and that its memory does not grow with them.

    python benchmarks/trace.py --shared ../shared --work DIR

CPU seconds on one thread, the least of several rounds over all sides in turn. "forward" is the whole model; "body" the
model without its head, which a trace leaves out too: the harder side to be compared with. Memory is the highest
resident size of a process of its own for each amount of text.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import numpy as np
import torch
from measuring import least, stock, verdict
from transformers import AutoModelForCausalLM, MixtralConfig

from prismoe import Domain, DomainSource, convert, make_plan, prepare, trace
from prismoe.routing.meter import metering
from prismoe.routing.texts import TracedText, domain_text
from prismoe.routing.trace import read_text
from prismoe.train.experts import use_experts
from prismoe.train.model import load_model

GOAL, ROUNDS, BATCH = 1.3, 5, 8
DOMAINS = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")


def prepared(shared: Path, work: Path) -> tuple[Path, list[Path]]:
    """The 4 M parent as 8 experts, 2 of them active, and the seven domains in its tokens."""
    source, texts = shared / "models" / "parent-4m", shared / "corpora"
    plan = make_plan(source, method="random", num_experts=8, top_k=2)
    convert(source, plan, target="mixtral", out=work / "moe")
    sources = {
        name: DomainSource(
            train=(str(texts / name / "train-00000-of-00002.jsonl.zst"),),
            heldout=(str(texts / name / "heldout.jsonl.zst"),),
        )
        for name in DOMAINS
    }
    prepare(sources, tokenizer=source, out=work / "data")
    return work / "moe", [work / "data" / name for name in DOMAINS]


def drawn() -> tuple[torch.nn.Module, TracedText]:
    """A wider mixture with random weights on random ids: 16 experts, 4 active, hidden 512, 4 layers."""
    sizes = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 4, "vocab_size": 8192}
    config = MixtralConfig(
        **sizes, num_attention_heads=8, num_key_value_heads=8, num_local_experts=16, num_experts_per_tok=4
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(3, 8192, 4 * 511).astype(np.uint32)
    spans = np.array([[begin, begin + 511] for begin in range(0, len(tokens), 511)])
    return model, TracedText("drawn", "train", tokens, spans, 1, "")


def cost(name: str, model: torch.nn.Module, text: TracedText) -> None:
    use_experts(model)
    model.eval()
    batches = [torch.from_numpy(ids) for _, ids in text.batches(BATCH)]
    tokens = int((text.spans_W2[:, 1] - text.spans_W2[:, 0]).sum())

    def forward() -> None:
        for ids in batches:
            model(input_ids=ids, use_cache=False)

    def body() -> None:
        for ids in batches:
            model.base_model(input_ids=ids, use_cache=False)

    def traced() -> None:
        with metering(model) as meter:
            read_text(model, text, meter, size=4096, batch_size=BATCH, seed=0, where=name)

    with torch.no_grad():
        spent = least({"forward": (forward, stock), "body": (body, stock), "traced": (traced, stock)}, ROUNDS)
    ratios = [spent["traced"] / spent[side] for side in ("forward", "body")]
    print(f"{name}: {tokens:,} tokens in {len(batches)} batches")
    print("  CPU seconds: " + ", ".join(f"{side} {seconds:.2f}" for side, seconds in spent.items()))
    print(f"  over the forward pass: {verdict(ratios[0], GOAL, at_most=True)}")
    print(f"  over the body alone:   {verdict(ratios[1], GOAL, at_most=True)}", flush=True)


def memory(work: Path) -> None:
    """Highest resident size of a trace of books, by tokens read."""
    sizes = {}
    for tokens in (4_096, 16_384, 65_536):
        command = [sys.executable, __file__, "--work", str(work), "--only", str(tokens)]
        sizes[tokens] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print("memory: " + ", ".join(f"{tokens:,} tokens {size / 1e6:.0f} MB" for tokens, size in sizes.items()))
    print(f"  16 times the text: {verdict(max(sizes.values()) / min(sizes.values()), 1.05, at_most=True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, help="the folder with models/ and corpora/")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        books = arguments.work / "data" / "books"
        trace(arguments.work / "moe", [books], max_tokens=arguments.only, batch_size=BATCH)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    moe, domains = prepared(arguments.shared, arguments.work)
    text = domain_text(Domain.open(domains[2]), seq_len=512, max_tokens=16_384, seed=0)
    cost("4 M parameters, 8 experts, top-2, github", load_model(moe), text)
    cost("14 M parameters, 16 experts, top-4, random ids", *drawn())
    memory(arguments.work)


if __name__ == "__main__":
    main()
