"""Every model on every task, each pair computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError
from prismoe.evaluate.kept import Kept
from prismoe.evaluate.localfiles import LOCAL
from prismoe.evaluate.tasks import TaskResult, WantedTask, score_wanted, suites
from prismoe.folder import sha256_file, versions
from prismoe.panics import read_tokenizer, told
from prismoe.progress import Progress

if TYPE_CHECKING:
    from prismoe.evaluate.harness import Benchmark

__all__ = ["check_tokenizer", "content", "count_requests", "score_benchmarks", "task_files"]


def task_files(suite: str | None, tasks: Sequence[str] | None, files: Path) -> tuple[Path, ...]:
    """The files of the folder `files` whose items are scored; what is unknown or missing is left to `check_tasks`."""
    wanted = suites().get(suite, {}) if suite is not None else [task.partition(":")[0] for task in tasks or ()]
    places = [[files / name for _, name in LOCAL[task].scored] for task in wanted if task in LOCAL]
    found = [next((path for path in paths if path.is_file()), None) for paths in places]
    return tuple(dict.fromkeys(path for path in found if path is not None))


def content(files: Path) -> dict[str, str]:
    """What a folder of benchmark files holds: name → sha256."""
    return {path.name: sha256_file(path) for path in sorted(files.glob("*.json*")) if path.is_file()}


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """That prompts can be tokenised, and that the model knows every id that comes of it.

    Raises:
        InputError: there is no tokenizer, or it is a larger model's.
    """
    path, size = checkpoint.folder / "tokenizer.json", checkpoint.config.get("vocab_size")
    if not path.is_file():
        raise InputError("no tokenizer.json", where=str(checkpoint.folder), needed="one, to read benchmark prompts")
    with told(path):
        largest = max(read_tokenizer(path).get_vocab(with_added_tokens=True).values(), default=-1)
    if isinstance(size, int) and largest >= size:
        raise InputError(f"ids up to {largest}", where=str(path), needed=f"below the model's vocab_size {size}")


def count_requests(wanted: Sequence[WantedTask], *, limit: int | None, seed: int) -> list[dict[str, Any]]:
    """How many documents and prompts each task comes to; None without files: the hub's are not there yet."""
    rows: list[dict[str, Any]] = []
    for one in wanted:
        rows.append({"task": one.task, "num_fewshot": one.num_fewshot, "num_documents": None, "num_requests": None})
        if one.rows is not None:
            from prismoe.evaluate.harness import open_benchmark, tamed_harness

            benchmark = open_benchmark(one.task, one.rows, num_fewshot=one.num_fewshot, limit=limit, seed=seed)
            documents = prompts = 0
            with tamed_harness():
                for name, places in benchmark.chosen.items():
                    part = benchmark.parts[name]
                    docs = part.eval_docs  # made anew whenever it is asked for
                    documents += len(places)
                    choices = (part.doc_to_choice(docs[place]) if benchmark.has_choices else [""] for place in places)
                    prompts += sum(map(len, choices))
            rows[-1] |= {"num_documents": documents, "num_requests": prompts}
    return rows


def score_benchmarks(
    models: Mapping[str, Checkpoint],
    wanted: Sequence[WantedTask],
    identities: Mapping[str, dict[str, str | None]],
    *,
    files: Path | None,
    limit: int | None,
    batch_size: int,
    seed: int,
    kept: Kept,
    on_progress: Progress,
) -> dict[str, list[TaskResult]]:
    """Model → results in the order of `wanted`; what was kept under the same `identities` is not computed again.

    Raises:
        UsageError, InputError, ResourceError, NumericalError: see `score_wanted`.
    """
    common: dict[str, Any] = {}
    if wanted:
        common = {"files": files and content(files), "limit": limit, "seed": seed, "versions": _versions()}
    found: dict[str, list[TaskResult]] = {}
    opened: dict[WantedTask, Benchmark] = {}
    for name, checkpoint in models.items() if wanted else ():
        tokenizer = sha256_file(checkpoint.folder / "tokenizer.json")
        of_model = {"model": {**identities[name], "tokenizer": tokenizer}, **common}
        done = {one.task: kept.find(task=one.task, num_fewshot=one.num_fewshot, **of_model) for one in wanted}
        results = {task: _read(before) for task, before in done.items() if before is not None}

        def keep(
            result: TaskResult,
            of_model: dict[str, Any] = of_model,
            results: dict[str, TaskResult] = results,
        ) -> None:
            results[result.task] = result
            written = {**result.to_dict(), "per_document": result.per_document_N.tolist()}
            kept.keep(written, task=result.task, num_fewshot=result.num_fewshot, **of_model)

        def progress(what: str, count: int, total: int, name: str = name) -> None:
            on_progress(f"benchmarks: {name} on {what.partition(': ')[2] or what}", count, total)

        if left := [one for one in wanted if one.task not in results]:
            score_wanted(
                checkpoint.folder,
                left,
                limit=limit,
                batch_size=batch_size,
                seed=seed,
                opened=opened,
                on_result=keep,
                on_progress=progress,
            )
        found[name] = [results[one.task] for one in wanted]
    return found


def _read(kept: dict[str, Any]) -> TaskResult:
    per_document_N = np.array(kept.pop("per_document"), np.float64)
    return TaskResult(**kept, per_document_N=per_document_N)


def _versions() -> dict[str, str]:
    return {**versions(), "lm_eval": metadata.version("lm_eval")}
