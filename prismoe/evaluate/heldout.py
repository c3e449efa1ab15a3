"""`evaluate`: held-out loss, perplexity and bits a byte of several models on the same windows of several domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain, Windows, heldout_windows
from prismoe.errors import InputError, UsageError
from prismoe.folder import MANIFEST, sha256_file, versions
from prismoe.progress import Progress, quiet
from prismoe.train.device import num_threads
from prismoe.train.fit import check_fit
from prismoe.train.model import load_model
from prismoe.train.scoring import TextLoss, score_text

__all__ = ["DomainScore", "Scores", "evaluate"]


@dataclass(frozen=True)
class DomainScore:
    """One model on one domain.

    `loss` is nats a token over `scored_tokens` of text, `perplexity` its exponential, `bits_per_byte` the same loss in
    bits a byte of UTF-8. `standard_error` belongs to `loss`, over documents. `change` is the loss minus that of the
    first model, with the standard error of the paired difference: the text is the same, so it is far smaller than that
    of either loss. A standard error is None where there is one document only.
    """

    model: str
    domain: str
    loss: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float
    change: float
    change_standard_error: float | None
    scored_tokens: int
    bytes: int
    documents: int
    windows: int


@dataclass(frozen=True)
class Scores:
    """Receipt: `scores` in the order of models, then domains; `models` and `domains` say what exactly was measured."""

    scores: tuple[DomainScore, ...]
    models: dict[str, dict[str, Any]]
    domains: dict[str, dict[str, Any]]
    seq_len: int
    versions: dict[str, str]

    def of(self, model: str, domain: str) -> DomainScore:
        """The score of one pair."""
        return next(score for score in self.scores if (score.model, score.domain) == (model, domain))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    models: Mapping[str, str | Path | Checkpoint],
    domains: Iterable[Domain | str | Path],
    *,
    seq_len: int,
    max_tokens: int | None = 100_000,
    batch_size: int = 16,
    threads: int = 0,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> Scores:
    """Score `models` (name → folder; the first is the one others are compared with) on the held-out split of `domains`.

    Each document is cut into windows of `seq_len` that score every token of its text once (`heldout_windows`); at most
    `max_tokens` a domain are read, in whole documents. Computed in float32 whatever the stored dtype, one model at a
    time.

    Raises:
        UsageError: no model or no domain.
        InputError: a model or domain that is damaged, or was made with another tokenizer.
        NumericalError: a loss that is not finite.
    """
    opened = {domain.name: domain for domain in (d if isinstance(d, Domain) else Domain.open(d) for d in domains)}
    if not models or not opened:
        raise UsageError("nothing to evaluate", needed="at least one model and one domain")
    checkpoints = {name: Checkpoint.open(source, offline=offline) for name, source in models.items()}
    windows = {name: heldout_windows(domain, seq_len=seq_len, max_tokens=max_tokens) for name, domain in opened.items()}
    for checkpoint in checkpoints.values():
        if not checkpoint.has_weights:
            raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
        check_fit(checkpoint, opened.values(), seq_len=seq_len)
    total, done = len(checkpoints) * sum(len(part) for part in windows.values()), 0
    first: dict[str, TextLoss] = {}
    rows: list[DomainScore] = []
    described = {}
    with num_threads(threads):
        for name, checkpoint in checkpoints.items():
            model = load_model(checkpoint.folder)
            described[name] = _describe(checkpoint, sum(parameter.numel() for parameter in model.parameters()))
            for domain, part in windows.items():

                def after_batch(count: int, base: int = done, what: str = f"evaluate: {name} on {domain}") -> None:
                    on_progress(what, base + count, total)

                found = score_text(
                    model,
                    opened[domain],
                    part,
                    batch_size=batch_size,
                    where=f"{name} on {domain}",
                    after_batch=after_batch,
                )
                done += len(part)
                rows.append(_score(name, domain, found, first.setdefault(domain, found), part))
            del model
    return Scores(
        scores=tuple(rows),
        models=described,
        domains={name: {"folder": str(d.folder), "manifest": _manifest(d.folder)} for name, d in opened.items()},
        seq_len=seq_len,
        versions=versions(),
    )


def _score(model: str, domain: str, found: TextLoss, first: TextLoss, windows: Windows) -> DomainScore:
    change = TextLoss(found.nats - first.nats, found.tokens)
    return DomainScore(
        model=model,
        domain=domain,
        loss=found.loss,
        standard_error=found.standard_error,
        perplexity=math.exp(min(found.loss, 700.0)),
        bits_per_byte=float(found.nats.sum()) / windows.num_bytes / math.log(2),
        change=change.loss,
        change_standard_error=change.standard_error,
        scored_tokens=windows.num_tokens,
        bytes=windows.num_bytes,
        documents=windows.num_documents,
        windows=len(windows),
    )


def _describe(checkpoint: Checkpoint, parameters: int) -> dict[str, Any]:
    folder = checkpoint.folder
    return {
        "folder": str(folder),
        "model_type": checkpoint.config.get("model_type"),
        "parameters": parameters,
        "fingerprint": checkpoint.fingerprint,
        "manifest": _manifest(folder),
    }


def _manifest(folder: Path) -> str | None:
    """sha256 of a folder's manifest, which holds the sha256 of everything in it."""
    path = folder / MANIFEST
    return sha256_file(path) if path.is_file() else None
