"""`prismoe tune` beside TRL's SFTTrainer called directly: same model, rows, batches, optimizer, experts function.

    python benchmarks/tune.py [--model FOLDER --data FILE] [--layers 4 --hidden 256]

Both train full parameters in float32 on one thread. Direct is what a person would write: SFTTrainer on packed rows with
the stock class's own balance loss; ours has noisy top-k routing, its balance loss, the log and the watching of routers.
Steps are timed in CPU seconds and runs are interleaved; on a busy machine the least step says most. Memory is the peak
of a process that ran one of the two alone, at the end of its last step (before ours saves its state). The goal is 95 %
of the direct speed and no more memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def made_model(folder: Path, *, layers: int, hidden: int) -> Path:
    """A mixture of 8 experts, top-2, with random weights and the tokenizer of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.training import tiny_moe

    sizes = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    return tiny_moe(folder, num_local_experts=8, max_position_embeddings=2048, vocab_size=2048, **sizes)


def made_data(path: Path, *, count: int) -> Path:
    """Conversations of uneven length."""
    from tests.tiny import TEXT

    lines = []
    for number in range(count):
        turns = [f"{number} {TEXT[number % 3]}" * (1 + number % 4), TEXT[(number + 1) % 3] * (1 + number % 7)]
        said = [{"from": ("human", "gpt")[place % 2], "value": turn} for place, turn in enumerate(turns)]
        lines.append(json.dumps({"conversations": said}) + "\n")
    path.write_text("".join(lines))
    return path


def run(which: str, model: Path, data: Path, *, seq_len: int, rows: int, steps: int) -> dict[str, Any]:
    """One process: CPU seconds of each step, and the peak of its memory."""
    from transformers import TrainerCallback

    from prismoe.checkpoint import Checkpoint
    from prismoe.train.experts import use_experts
    from prismoe.train.model import load_model
    from prismoe.tune import TuneConfig
    from prismoe.tune.rows import open_tokenizer, read_rows

    config = TuneConfig(
        data=str(data), template="vicuna_v1_1", max_refused=0.5, seq_len=seq_len, batch_size=rows, packing=True,
        epochs=1, lr=1e-4, heldout=0.02, threads=1, device="cpu", max_steps=steps,
    )  # fmt: skip
    checkpoint = Checkpoint.open(model)
    clock: list[tuple[float, int]] = []  # CPU seconds of a step, and the peak of memory so far

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            clock.append((time.process_time() - self.begin, peak))

    if which == "direct":
        import torch
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer

        torch.set_num_threads(1)
        found = read_rows(config, checkpoint, open_tokenizer(checkpoint), offline=True, on_progress=lambda *_: None)
        stock = load_model(model)
        use_experts(stock)
        with tempfile.TemporaryDirectory() as out:
            arguments = SFTConfig(
                output_dir=out, per_device_train_batch_size=1, gradient_accumulation_steps=rows, max_steps=steps,
                learning_rate=1e-4, lr_scheduler_type="cosine", weight_decay=0.0, bf16=False, use_cpu=True,
                activation_checkpointing=False, packing=True, max_length=seq_len, report_to=[], save_strategy="no",
                disable_tqdm=True, dataset_kwargs={"skip_prepare_dataset": True}, logging_steps=1,
            )  # fmt: skip
            trainer = SFTTrainer(
                stock, arguments, train_dataset=found.dataset, processing_class=open_tokenizer(checkpoint)
            )
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(Clock())
            trainer.train()
    else:
        from prismoe.errors import InterruptedRun
        from prismoe.tune import trainer as trainer_module
        from prismoe.tune import training, tune

        def timed(*args: Any) -> Any:
            made = trainer_module.make_trainer(*args)
            made.add_callback(Clock())
            return made

        training.make_trainer = timed
        # It stops as asked, after so many steps.
        with tempfile.TemporaryDirectory() as out, contextlib.suppress(InterruptedRun):
            tune(model, config, out=Path(out) / "out")
    return {"seconds": [seconds for seconds, _ in clock], "peak": clock[-1][1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=4, help="packed rows a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("direct", "ours"), help="one process, for the rounds")
    given = parser.parse_args()
    if given.only:
        print(
            json.dumps(
                run(given.only, given.model, given.data, seq_len=given.seq_len, rows=given.rows, steps=given.steps)
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or made_model(Path(folder) / "moe", layers=given.layers, hidden=given.hidden)
        data = given.data or made_data(Path(folder) / "talk.jsonl", count=200 * given.steps)
        found: dict[str, list[dict[str, Any]]] = {"direct": [], "ours": []}
        for _ in range(given.rounds):
            for which, runs in found.items():
                options = [f"--model={model}", f"--data={data}", f"--seq-len={given.seq_len}", f"--rows={given.rows}"]
                command = [sys.executable, __file__, f"--only={which}", *options, f"--steps={given.steps}"]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    tokens = given.seq_len * given.rows
    least = {}
    for which, runs in found.items():
        steps = [second for one in runs for second in one["seconds"][1:]]  # the first one warms up
        least[which] = min(steps)
        peak = statistics.median(one["peak"] for one in runs) / 1e6
        best, usual = (tokens / second for second in (least[which], statistics.median(steps)))
        print(f"{which:<7} {best:7.0f} ids/CPU-s, best of {len(steps)} steps (median {usual:.0f}), peak {peak:.0f} MB")
    peaks = {which: statistics.median(one["peak"] for one in runs) for which, runs in found.items()}
    speed, memory = least["direct"] / least["ours"], peaks["ours"] / peaks["direct"]
    print(f"speed   {speed:.3f} of direct ({'reached' if speed >= 0.95 else 'missed'}: 0.95)")
    print(f"memory  {memory:.3f} of direct ({'reached' if memory <= 1.05 else 'missed'}: 1.05)")
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
