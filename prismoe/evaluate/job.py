"""`evaluate`: several models side by side on held-out text of each domain and on benchmark tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain, heldout_windows
from prismoe.errors import InputError, UsageError
from prismoe.evaluate.benchmarks import check_tokenizer, score_benchmarks
from prismoe.evaluate.compare import TaskScore, compare_tasks
from prismoe.evaluate.control import STATIC, Control
from prismoe.evaluate.findings import find
from prismoe.evaluate.heldout import DomainScore, score_texts, text_scores
from prismoe.evaluate.kept import Kept
from prismoe.evaluate.tasks import TaskResult, check_tasks
from prismoe.folder import MANIFEST, sha256_file, versions
from prismoe.progress import Progress, quiet
from prismoe.train.device import num_threads
from prismoe.train.fit import check_fit, num_experts

__all__ = ["Scores", "evaluate"]


@dataclass(frozen=True)
class Scores:
    """Receipt: `scores` in the order of models, then domains, `tasks` in that of models, then tasks.

    `models`, `domains` and `benchmarks` say what exactly was measured (of a task: harness version, hashes of definition
    and documents, shots, where it differs from the stock one), `control` what the static control is, `findings` in
    sentences what the numbers mean.
    """

    scores: tuple[DomainScore, ...]
    tasks: tuple[TaskScore, ...]
    models: dict[str, dict[str, Any]]
    domains: dict[str, dict[str, Any]]
    benchmarks: dict[str, dict[str, Any]]
    control: dict[str, Any] | None
    findings: tuple[str, ...]
    warnings: tuple[str, ...]
    seq_len: int
    seed: int
    versions: dict[str, str]

    def of(self, model: str, domain: str) -> DomainScore:
        """The score of one model on one domain."""
        return next(score for score in self.scores if (score.model, score.domain) == (model, domain))

    def on(self, model: str, task: str) -> TaskScore:
        """The score of one model on one task, or its "average"."""
        return next(score for score in self.tasks if (score.model, score.task) == (model, task))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    models: Mapping[str, str | Path | Checkpoint],
    domains: Iterable[Domain | str | Path],
    *,
    seq_len: int = 512,
    max_tokens: int | None = 100_000,
    suite: str | None = None,
    tasks: Sequence[str] | None = None,
    files: str | Path | None = None,
    limit: int | None = None,
    control: Control | None = None,
    batch_size: int = 16,
    threads: int = 0,
    seed: int = 0,
    keep: str | Path | None = None,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Scores:
    """Score `models` (name → folder; the first is the one others are compared with) on text, on tasks, or on both.

    Text is the held-out split of `domains`: each document is cut into windows of `seq_len` that score every token of it
    once (`heldout_windows`); at most `max_tokens` a domain are read, in whole documents. Tasks are those of
    lm-evaluation-harness: see `score_tasks`, and `compare` for the test of the differences. Everything is computed in
    float32 whatever the stored dtype, one model at a time, and no result depends on `batch_size`.

    Args:
        suite: a named protocol, "llama-moe" or "alignment"; or
        tasks: names of tasks, "boolq" or with other shots "boolq:5".
        files: a folder of benchmark files; without it the harness fetches its own.
        limit: documents a task, the first ones.
        control: see `static_control`; it is scored as one more model, and held against the mixtures.
        seed: of drawn examples and of the paired test.
        keep: folder where finished pairs of a model and a text or task wait for a call that was stopped.

    Raises:
        UsageError: no model, nothing to measure on, an unknown suite or task.
        InputError: a model, domain or benchmark file that is damaged, or was made with another tokenizer.
        NumericalError: a loss or a logit that is not finite.
        ResourceError: the harness is not installed.
    """
    opened = {domain.name: domain for domain in (d if isinstance(d, Domain) else Domain.open(d) for d in domains)}
    asked = suite is not None or tasks is not None
    if not models or not (opened or asked):
        raise UsageError("nothing to evaluate", needed="at least one model and one domain or task")
    files = None if files is None else Path(files)
    wanted = check_tasks(suite, tasks, files, offline=offline) if asked else ()
    if control is not None and control.folder is not None:
        models = {**models, STATIC: control.folder}
    checkpoints = {name: Checkpoint.open(source, offline=offline) for name, source in models.items()}
    windows = {name: heldout_windows(domain, seq_len=seq_len, max_tokens=max_tokens) for name, domain in opened.items()}
    for checkpoint in checkpoints.values():
        if not checkpoint.has_weights:
            raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
        if opened:
            check_fit(checkpoint, opened.values(), seq_len=seq_len)
        if wanted:
            check_tokenizer(checkpoint)
    kept = Kept(keep)
    described = {name: _describe(checkpoint) for name, checkpoint in checkpoints.items()}
    texts_of = {name: {"folder": str(d.folder), "manifest": _manifest(d.folder)} for name, d in opened.items()}
    identities = {
        name: {"manifest": row["manifest"], "fingerprint": row["fingerprint"]} for name, row in described.items()
    }
    identities |= {f"domain {name}": {"manifest": row["manifest"]} for name, row in texts_of.items()}
    with num_threads(threads):
        texts = score_texts(
            checkpoints,
            {name: (domain, windows[name]) for name, domain in opened.items()},
            identities,
            batch_size=batch_size,
            kept=kept,
            on_progress=on_progress,
        )
        found = score_benchmarks(
            checkpoints,
            wanted,
            identities,
            files=files,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            kept=kept,
            on_progress=on_progress,
        )
    rows = compare_tasks(found, seed=seed) if found else ()
    first = next(iter(found.values()), ())
    return Scores(
        scores=text_scores(texts, windows),
        tasks=rows,
        models=described,
        domains=texts_of,
        benchmarks={one.task: one.to_dict() for one in first},
        control=None if control is None else control.to_dict(),
        findings=find(rows, found, texts, control=control, seed=seed),
        warnings=tuple(_truncated(found)),
        seq_len=seq_len,
        seed=seed,
        versions=versions(),
    )


def _truncated(found: Mapping[str, Sequence[TaskResult]]) -> Iterator[str]:
    """Prompts that a model could not read whole: its score is not that of the protocol. Alike models share a line."""
    told: dict[str, list[str]] = {}
    for name, results in found.items():
        cut = [f"{one.task} {one.num_truncated:,} of {one.num_requests:,}" for one in results if one.num_truncated]
        if cut:
            told.setdefault(", ".join(cut), []).append(name)
    for counts, names in told.items():
        yield f"{', '.join(names)}: prompts longer than the context lost their beginning: {counts}"


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    folder = checkpoint.folder
    return {
        "folder": str(folder),
        "model_type": checkpoint.config.get("model_type"),
        "num_experts": num_experts(checkpoint.config),
        "parameters": sum(math.prod(info.shape) for info in checkpoint.tensors.values()),
        "fingerprint": checkpoint.fingerprint,
        "manifest": _manifest(folder),
    }


def _manifest(folder: Path) -> str | None:
    """sha256 of a folder's manifest, which holds the sha256 of everything in it."""
    path = folder / MANIFEST
    return sha256_file(path) if path.is_file() else None
