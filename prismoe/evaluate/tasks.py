"""`score_tasks`: one model on benchmark tasks as lm-evaluation-harness defines them, from local files or its hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.progress import Progress, quiet

__all__ = ["TaskResult", "WantedTask", "check_tasks", "score_tasks"]


@dataclass(frozen=True)
class WantedTask:
    """One task as it will be run: what the table calls it, its examples in the prompt, the metric that is its score."""

    task: str
    num_fewshot: int
    metric: str


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

    A task is written `name` or `name:shots`; without shots it takes those of the paper's protocol.

    Raises:
        UsageError: both or neither given, an unknown suite or task, a task that runs generated code, no `files` while
            `offline`.
        InputError: a benchmark file is missing or damaged.
        ResourceError: the harness is not installed.
    """
    raise NotImplementedError


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
    on_progress: Progress = quiet,
) -> list[TaskResult]:
    """Score the stock model in `model_folder` on the tasks of `suite` or `tasks`, in float32, in their order.

    `files` is a folder of JSONL files; without it the harness fetches its own data. At most `limit` documents a task
    are scored: the first ones, spread over the subjects of MMLU. `batch_size` prompts are computed at once.

    Raises:
        UsageError, InputError, ResourceError: see `check_tasks`; a tokenizer that does not fit the model.
        NumericalError: logits that are not finite.
    """
    raise NotImplementedError
