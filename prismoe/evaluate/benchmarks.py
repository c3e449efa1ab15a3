"""Every model on every task, each pair computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError
from prismoe.evaluate.kept import Kept
from prismoe.evaluate.tasks import TaskResult, WantedTask, score_tasks
from prismoe.folder import sha256_file, versions
from prismoe.progress import Progress

__all__ = ["check_tokenizer", "score_benchmarks"]


def check_tokenizer(checkpoint: Checkpoint) -> None:
    """That prompts can be tokenised, and that the model knows every id that comes of it.

    Raises:
        InputError: there is no tokenizer, or it is a larger model's.
    """
    from tokenizers import Tokenizer

    path, size = checkpoint.folder / "tokenizer.json", checkpoint.config.get("vocab_size")
    if not path.is_file():
        raise InputError("no tokenizer.json", where=str(checkpoint.folder), needed="one, to read benchmark prompts")
    try:
        largest = max(Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True).values(), default=-1)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"not a tokenizer ({error})"[:200], where=str(path)) from error
    if isinstance(size, int) and largest >= size:
        raise InputError(f"ids up to {largest}", where=str(path), needed=f"below the model's vocab_size {size}")


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
    offline: bool,
    on_progress: Progress,
) -> dict[str, list[TaskResult]]:
    """Model → results in the order of `wanted`; what was kept under the same `identities` is not computed again.

    Raises:
        UsageError, InputError, ResourceError, NumericalError: see `score_tasks`.
    """
    common = {"files": _content(files), "limit": limit, "seed": seed, "versions": _versions()} if wanted else {}
    found: dict[str, list[TaskResult]] = {}
    for name, checkpoint in models.items() if wanted else ():
        tokenizer = sha256_file(checkpoint.folder / "tokenizer.json")
        of_model = {"model": {**identities[name], "tokenizer": tokenizer}, **common}
        done = {one.task: kept.find(task=one.task, num_fewshot=one.num_fewshot, **of_model) for one in wanted}
        results = {task: _read(before) for task, before in done.items() if before is not None}

        def keep(result: TaskResult, of_model: dict[str, Any] = of_model) -> None:
            written = {**result.to_dict(), "per_document": result.per_document_N.tolist()}
            kept.keep(written, task=result.task, num_fewshot=result.num_fewshot, **of_model)

        def progress(what: str, count: int, total: int, name: str = name) -> None:
            on_progress(f"benchmarks: {name} on {what.partition(': ')[2] or what}", count, total)

        for one in wanted:
            if one.task not in results:
                (results[one.task],) = score_tasks(
                    checkpoint.folder,
                    tasks=[f"{one.task}:{one.num_fewshot}"],
                    files=files,
                    limit=limit,
                    batch_size=batch_size,
                    seed=seed,
                    offline=offline,
                    on_progress=progress,
                )
                keep(results[one.task])
        found[name] = [results[one.task] for one in wanted]
    return found


def _read(kept: dict[str, Any]) -> TaskResult:
    per_document_N = np.array(kept.pop("per_document"), np.float64)
    return TaskResult(**kept, per_document_N=per_document_N)


def _versions() -> dict[str, str]:
    return {**versions(), "lm_eval": metadata.version("lm_eval")}


def _content(files: Path | None) -> dict[str, str] | None:
    """What a folder of benchmark files holds."""
    if files is None:
        return None
    return {path.name: sha256_file(path) for path in sorted(files.glob("*.json*")) if path.is_file()}
