"""Calibration against the forward and backward passes it needs, in one run, interleaved; prints medians and ratios.

The passes: the whole stock model in float32 with frozen weights, the same sequences in the same batches, its own loss,
and a backward pass as deep as the first FFN, which is what importance needs; no statistics, no files. For quantities
that need no gradient: the forward pass alone. Calibration is timed from the call to the finished folder, loading,
clustering and writing included.

    python benchmarks/calibrate.py MODEL_FOLDER TEXT.jsonl[.zst] …  [--tokens 65536] [--threads 1] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.calibrate.text import Text, draw_text
from prismoe.data.prepare import DomainSource, prepare
from prismoe.data.shards import Domain
from prismoe.train.device import num_threads
from prismoe.train.model import load_model

CASES: dict[str, dict[str, Any]] = {
    "importance alone": {"quantities": ("importance",)},
    "the default quantities": {},
    "the default, 8 text clusters": {"clusters": 8},
    "everything": {
        "clusters": 8,
        "quantities": ("activation", "importance", "marks", "coactivation", "inputs", "scores", "output"),
    },
    "forward quantities alone": {"quantities": ("activation", "marks", "inputs", "output")},
}


def clock() -> tuple[float, float]:
    """Wall and CPU seconds; a busy machine lengthens the first only."""
    return time.perf_counter(), time.process_time()


def passes(model: Any, text: Text, *, batch_size: int, gradient: bool) -> None:
    """The stock model over `text`."""
    cut = model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda module, args: (args[0].detach().requires_grad_(),)
    )
    for first in range(0, len(text), batch_size):
        ids = torch.from_numpy(text.ids(first, min(first + batch_size, len(text))))
        if gradient:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        else:
            with torch.no_grad():
                model.model(input_ids=ids, use_cache=False)
    cut.remove()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", nargs="+")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, num_threads(arguments.threads):
        root = Path(folder)
        prepare({"text": DomainSource(tuple(arguments.text))}, tokenizer=arguments.model, out=root / "data")
        domain = Domain.open(root / "data" / "text")
        model = load_model(arguments.model).requires_grad_(False).eval()
        rows: dict[str, dict[str, float]] = {}
        for number, (name, settings) in enumerate(CASES.items()):
            config = CalibrateConfig(
                seq_len=arguments.seq_len,
                max_tokens=arguments.tokens,
                threads=arguments.threads,
                device="cpu",
                **settings,
            )
            text = draw_text(
                [domain],
                weights="uniform",
                seq_len=config.seq_len,
                max_tokens=config.max_tokens,
                sample_tokens=1,
                start_token=False,
                seed=0,
            )
            rounds = []
            for attempt in range(arguments.rounds):
                start = clock()
                passes(model, text, batch_size=config.batch_size, gradient=config.gradient)
                middle = clock()
                calibrate(arguments.model, config, domains=[domain], out=root / f"{number}-{attempt}")
                end = clock()
                rounds.append([(b - a, c - b) for a, b, c in zip(start, middle, end, strict=True)])
            row = {"tokens": text.num_tokens}
            for place, kind in enumerate(("wall", "cpu")):
                row[f"passes_{kind}_s"] = statistics.median(one[place][0] for one in rounds)
                row[f"calibrate_{kind}_s"] = statistics.median(one[place][1] for one in rounds)
                row[f"{kind}_ratio"] = statistics.median(one[place][1] / one[place][0] for one in rounds)
            rows[name] = row
            if not arguments.json:
                print(
                    f"{name:30} {row['tokens']:>8} tokens   CPU seconds: passes {row['passes_cpu_s']:7.2f}, "
                    f"calibrate {row['calibrate_cpu_s']:7.2f}, ratio {row['cpu_ratio']:5.2f}   "
                    f"(wall ratio {row['wall_ratio']:5.2f})",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
