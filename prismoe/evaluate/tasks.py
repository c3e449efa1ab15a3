"""`score_tasks`: one model on benchmark tasks as lm-evaluation-harness defines them, from local files or its hub."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.evaluate.localfiles import LOCAL, LocalFiles, read_files
from prismoe.progress import Progress, quiet
from prismoe.registry import names, suggestion

if TYPE_CHECKING:
    from prismoe.evaluate.harness import Benchmark, HarnessModel

__all__ = ["TaskResult", "WantedTask", "check_tasks", "mean_error", "score_tasks", "score_wanted", "suites"]

_SUITES = "prismoe.evaluate.suites"


@dataclass(frozen=True)
class WantedTask:
    """One task as it will be run, with the number of examples in its prompts, and the rows of its files (None: the
    harness fetches its own), which are read once for all models."""

    task: str
    num_fewshot: int
    rows: LocalFiles | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class TaskResult:
    """One model on one task.

    `score` is the mean over documents of `metric`, `standard_error` its standard error (None for one document);
    `chance` is what blind guessing scores (None where the answer is free text). `num_truncated` of `num_requests`
    prompts did not fit the model and lost their beginning. `limit` is the most documents asked for. `task_hash`
    belongs to the task's resolved definition, `documents_hash` to the rendered prompts with their answers: two results
    with the same two hashes answered the same questions. `note` says where the task differs from its stock definition,
    "" where it does not. `per_document_N` holds the metric of each document, in their order, for paired tests.
    """

    task: str
    metric: str
    score: float
    standard_error: float | None
    chance: float | None
    num_fewshot: int
    num_documents: int
    num_requests: int
    num_truncated: int
    limit: int | None
    seed: int
    harness: str
    task_hash: str
    documents_hash: str
    note: str
    per_document_N: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the documents, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "per_document_N"}


def check_tasks(
    suite: str | None, tasks: Sequence[str] | None, files: Path | None, *, offline: bool = False
) -> tuple[WantedTask, ...]:
    """The tasks of `suite` or `tasks` in the order they are shown, after everything that can be wrong without a model.

    A task is written `name` or `name:shots`; without shots it takes those of a suite that has it, else none.

    Raises:
        UsageError: both or neither given, an unknown suite or task, a task twice or one that runs generated code, no
            `files` while `offline`.
        InputError: a benchmark file is missing or damaged.
        ResourceError: the harness is not installed.
    """
    if (suite is None) == (tasks is None) or not (suite or tasks):
        raise UsageError("both suite and tasks" if suite and tasks else "no benchmark", needed="a suite or tasks")
    wanted = _suite(suite) if suite else tuple(_wanted(written) for written in tasks or ())
    twice = [one.task for number, one in enumerate(wanted) if one.task in {other.task for other in wanted[:number]}]
    if twice:
        raise UsageError(f"{twice[0]} twice", where="tasks", needed="each once")
    if importlib.util.find_spec("lm_eval") is None:
        raise ResourceError("lm-evaluation-harness is not installed", needed="pip install 'prismoe[eval]'")
    if files is None:
        if offline:
            raise UsageError("no benchmark files", where="offline", needed="files, a folder of JSONL")
        from prismoe.evaluate.harness import definition_files

        for one in wanted:
            definition_files(one.task)
        return wanted
    if not Path(files).is_dir():
        raise InputError("no such folder", where=str(files), needed="a folder of benchmark files")
    for one in wanted:
        if one.task not in LOCAL:
            from prismoe.evaluate.harness import refuse_code

            refuse_code(one.task)
            known = "one of " + ", ".join(LOCAL)
            hint = suggestion(one.task, LOCAL) + "; without files the harness fetches any of its tasks"
            raise UsageError(f"unknown task {one.task!r} for files", where="tasks", needed=known, hint=hint)
    return tuple(replace(one, rows=read_files(one.task, Path(files), num_fewshot=one.num_fewshot)) for one in wanted)


def score_tasks(
    model_folder: Path,
    *,
    suite: str | None = None,
    tasks: Sequence[str] | None = None,
    files: Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    offline: bool = False,
    on_result: Callable[[TaskResult], None] = lambda result: None,
    on_progress: Progress = quiet,
) -> list[TaskResult]:
    """Score the stock model in `model_folder` on the tasks of `suite` or `tasks`, in float32, in their order.

    `files` is a folder of JSONL files; without it the harness fetches its own data.

    Raises:
        UsageError, InputError, ResourceError, NumericalError: see `check_tasks` and `score_wanted`.
    """
    wanted = check_tasks(suite, tasks, files, offline=offline)
    return score_wanted(
        model_folder,
        wanted,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        on_result=on_result,
        on_progress=on_progress,
    )


def score_wanted(
    model_folder: Path,
    wanted: Sequence[WantedTask],
    *,
    limit: int | None,
    batch_size: int,
    seed: int,
    opened: dict[WantedTask, Benchmark] | None = None,
    on_result: Callable[[TaskResult], None],
    on_progress: Progress,
) -> list[TaskResult]:
    """Score the stock model in `model_folder` on tasks that were checked.

    At most `limit` documents a task are scored: the first ones, spread over the subjects of MMLU. `batch_size` prompts
    are computed at once; it changes log-likelihoods by rounding alone (prompts are padded on the right, behind
    everything that counts). `seed` draws the examples in prompts. `opened` keeps the harness's tasks for the next
    model, with the same `limit` and `seed`. `on_result` gets each result as soon as it is there.

    Raises:
        UsageError: a limit or batch_size below 1.
        InputError: a tokenizer that does not fit the model, an answer longer than its positions.
        ResourceError: a data set that cannot be fetched; too little memory.
        NumericalError: logits that are not finite.
    """
    if (limit is not None and limit < 1) or batch_size < 1:
        raise UsageError(f"limit {limit}, batch_size {batch_size}", needed="at least 1")
    from prismoe.evaluate.harness import open_benchmark, open_model, run

    model, results, opened = None, [], {} if opened is None else opened
    for one in wanted:
        if one not in opened:
            opened[one] = open_benchmark(one.task, one.rows, num_fewshot=one.num_fewshot, limit=limit, seed=seed)
        model = model or open_model(Path(model_folder), batch_size=batch_size, on_progress=on_progress)
        results.append(_result(model, opened[one], run(model, opened[one]), limit=limit))
        on_result(results[-1])
    return results


def suites() -> dict[str, dict[str, int]]:
    """Every suite by name: its tasks in order, with the number of examples in the prompt."""
    return {name.replace("_", "-"): dict(importlib.import_module(f"{_SUITES}.{name}").TASKS) for name in names(_SUITES)}


def mean_error(values_N: np.ndarray) -> float | None:
    """Standard error of the mean of values [N]; None for a single one."""
    return float(values_N.std(ddof=1) / math.sqrt(len(values_N))) if len(values_N) > 1 else None


def _suite(name: str) -> tuple[WantedTask, ...]:
    known = suites()
    if name not in known:
        raise UsageError(
            f"unknown {name!r}", where="suite", needed="one of " + ", ".join(known), hint=suggestion(name, known)
        )
    return tuple(WantedTask(task, shots) for task, shots in known[name].items())


def _wanted(written: str) -> WantedTask:
    task, _, shots = written.partition(":")
    if shots and not shots.isdecimal():
        raise UsageError(f"{shots!r} examples", where=f"tasks: {written}", needed="a whole number, as in arc_easy:5")
    usual = {name: count for suite in suites().values() for name, count in suite.items()}
    return WantedTask(task, int(shots) if shots else usual.get(task, 0))


def _result(
    model: HarnessModel, benchmark: Benchmark, documents: list[dict[str, Any]], *, limit: int | None
) -> TaskResult:
    per_document_N = np.array([float(document[benchmark.metric]) for document in documents])
    chances = [_chance(benchmark, document) for document in documents]
    # Texts alone: settings of a generation may depend on the model.
    prompts = [
        [[text for text in arguments if isinstance(text, str)] for arguments in document["arguments"]]
        + [document["target"]]
        for document in documents
    ]
    return TaskResult(
        task=benchmark.task,
        metric=benchmark.metric,
        score=float(per_document_N.mean()),
        standard_error=mean_error(per_document_N),
        chance=None if None in chances else float(np.mean(np.array(chances, np.float64))),
        num_fewshot=benchmark.num_fewshot,
        num_documents=len(documents),
        num_requests=model.requests,
        num_truncated=model.truncated,
        limit=limit,
        seed=benchmark.seed,
        harness=benchmark.harness,
        task_hash=benchmark.task_hash,
        documents_hash=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        note="; ".join((*benchmark.notes, *model.notes)),
        per_document_N=per_document_N,
    )


def _chance(benchmark: Benchmark, document: dict[str, Any]) -> float | None:
    """What a blind guess scores on one document: one choice of several, or the share of true answers (mc2)."""
    if benchmark.task == "truthfulqa_mc2":
        return float(np.mean(document["doc"]["mc2_targets"]["labels"]))
    return 1 / len(document["arguments"]) if benchmark.has_choices else None
