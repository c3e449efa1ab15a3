"""What scoring benchmark tasks costs beside calling lm-evaluation-harness directly: same model, tasks and rows.

    python benchmarks/evaluate.py MODEL FILES [--limit 50] [--rounds 3]

CPU seconds of one thread, both sides in turns, the least of the rounds after one that settles. The direct side is
`lm_eval.evaluate` on the harness's own task objects and model class, with the model loaded and rows read anew as ours
are; imports are paid before. Goal: at most 5 % more.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.measuring import verdict
from prismoe.evaluate import harness
from prismoe.evaluate.localfiles import read_files
from prismoe.evaluate.tasks import score_tasks

TASKS = {"sciq": 0, "piqa": 0, "arc_challenge": 25, "hellaswag": 10, "boolq": 32, "lambada_openai": 0, "nq_open": 32}


def direct(model: Path, files: Path, limit: int) -> dict[str, float]:
    """Scores by the harness alone; only the rows come from us, since it cannot read these files."""
    lm = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer=AutoTokenizer.from_pretrained(model),
        batch_size=16,
    )
    tasks = {}
    for task, shots in TASKS.items():
        (path,) = harness.definition_files(task)
        config = harness._on_rows(load_yaml(path), read_files(task, files, num_fewshot=shots), by_subject=False)
        assert config is not None
        tasks[task] = harness.ConfigurableTask(config={**config, "num_fewshot": shots})
        tasks[task].set_fewshot_seed(0)
    found = evaluate(lm=lm, task_dict={"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=0)
    rows = found["results"]
    keys = {
        task: (f"acc_norm,{f}", f"acc,{f}", f"exact_match,{f}")
        for task in TASKS
        for f in [tasks[task]._filters[0].name]
    }
    return {task: next(rows[task][key] for key in keys[task] if key in rows[task]) for task in TASKS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("files", type=Path)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    wanted = [f"{task}:{shots}" for task, shots in TASKS.items()]

    def ours() -> dict[str, float]:
        results = score_tasks(given.model, tasks=wanted, files=given.files, limit=given.limit)
        return {result.task: result.score for result in results}

    sides: dict[str, Callable[[], dict[str, float]]] = {
        "direct": lambda: direct(given.model, given.files, given.limit),
        "prismoe": ours,
    }
    least: dict[str, float] = {}
    scores: dict[str, Any] = {}
    for turn in range(given.rounds + 1):
        for name, work in sides.items():
            begin = time.process_time()
            scores[name] = work()
            if turn:
                least[name] = min(least.get(name, float("inf")), time.process_time() - begin)
    assert scores["direct"] == scores["prismoe"], scores
    for name, seconds in least.items():
        print(f"{name}: {seconds:.1f} CPU seconds for {len(TASKS)} tasks of {given.limit} documents")
    print("time beside the harness:", verdict(least["prismoe"] / least["direct"], 1.05, at_most=True))


if __name__ == "__main__":
    main()
