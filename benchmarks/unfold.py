"""Which scale trains better: folded into down_proj, or taken out of it while training (`pretrain.unfold_scale`)?

    python benchmarks/unfold.py --shared ../shared --work DIR

Pairs of runs with the same plan, text and seed, 300 steps of 8 sequences of 256 tokens; held-out loss at the end. In
folded form AdamW moves down_proj s times less, measured against its size: a second learning rate, s times the first,
tells whether that is all there is to it. DIR keeps each finished run: the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

from prismoe import DomainSource, convert, make_plan, prepare
from prismoe.folder import write_json_atomic
from prismoe.train.pretrain import PretrainConfig, pretrain

CASES = {"stories260K": (4, 2, (1e-3, 2e-3)), "babyllama105": (8, 2, (1e-3,))}  # experts, top-k, learning rates
STEPS, SEEDS, MODES = 300, (0, 1, 2), ("folded", "unfolded")


def heldout_loss(shared: Path, work: Path, name: str, seed: int, rate: float, mode: str) -> float:
    """Mean held-out loss after training, in nats a token; 65,536 tokens."""
    result = work / f"{name}-{seed}-{rate}-{mode}.json"
    if not result.exists():
        source, text = shared / "models" / name, shared / "corpora" / "tinystories"
        train = tuple(str(path) for path in sorted(text.glob("train-*.zst")))
        domain = DomainSource(train=train, heldout=(str(text / "heldout.jsonl.zst"),))
        prepare({"tinystories": domain}, tokenizer=source, out=work / f"data-{name}")
        experts, top_k, _ = CASES[name]
        plan = make_plan(source, method="random", num_experts=experts, top_k=top_k, seed=seed, scale="paper")
        convert(source, plan, target="mixtral", out=work / f"moe-{name}-{seed}")
        config = PretrainConfig(
            **{"steps": STEPS, "warmup_steps": STEPS // 10, "lr": rate, "seq_len": 256, "batch_size": 8},
            **{"max_epochs": 50.0, "threads": 1, "seed": seed, "unfold_scale": mode == "unfolded"},
        )
        trained = pretrain(
            work / f"moe-{name}-{seed}",
            config,
            domains=[work / f"data-{name}" / "tinystories"],
            out=work / f"run-{name}-{seed}-{rate}-{mode}",
        )
        assert trained is not None
        write_json_atomic(result, {"loss": trained.heldout_after["tinystories"]})
    return float(json.loads(result.read_text())["loss"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared", type=Path, required=True, help="the folder with models/ and corpora/")
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    table: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for seed, (name, case) in itertools.product(SEEDS, CASES.items()):
        for rate in case[2]:
            pair = [heldout_loss(arguments.shared, arguments.work, name, seed, rate, mode) for mode in MODES]
            table.setdefault((name, rate), []).append((pair[0], pair[1]))
            print(f"{name}, seed {seed}, lr {rate}: folded {pair[0]:.4f}, unfolded {pair[1]:.4f}", flush=True)
    print("| model | lr | folded | unfolded | folded - unfolded, each seed |\n|---|---|---|---|---|")
    for (name, rate), pairs in table.items():
        folded, unfolded = (statistics.mean(losses) for losses in zip(*pairs, strict=True))
        each = ", ".join(f"{a - b:+.4f}" for a, b in pairs)
        print(f"| {name}, {CASES[name][1]} of {CASES[name][0]} | {rate:g} | {folded:.4f} | {unfolded:.4f} | {each} |")


if __name__ == "__main__":
    main()
