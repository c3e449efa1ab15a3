"""Held-out loss, perplexity and bits a byte of several models on the same windows of several domains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain, Windows
from prismoe.evaluate.kept import Kept
from prismoe.progress import Progress
from prismoe.train.model import load_model
from prismoe.train.scoring import TextLoss, score_text

__all__ = ["DomainScore", "Losses", "score_texts", "text_scores"]

Losses = dict[tuple[str, str], TextLoss]
"""(model, domain) → the loss of every document."""


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


def score_texts(
    models: Mapping[str, Checkpoint],
    domains: Mapping[str, tuple[Domain, Windows]],
    identities: Mapping[str, dict[str, str | None]],
    *,
    batch_size: int,
    kept: Kept,
    on_progress: Progress,
) -> Losses:
    """Score every model on every domain in float32; what was kept under the same `identities` is not computed again.

    Raises:
        InputError: a model that cannot be loaded.
        NumericalError: a loss that is not finite.
    """
    found: Losses = {}
    total, done = len(models) * sum(len(windows) for _, windows in domains.values()), 0
    for name, checkpoint in models.items():
        model = None
        for domain, (opened, windows) in domains.items():
            decides = {
                "model": identities[name],
                "text": identities[f"domain {domain}"],
                "seq_len": windows.seq_len,
                "documents": windows.num_documents,
            }
            if (before := kept.find(**decides)) is not None:
                found[name, domain] = TextLoss(np.array(before["nats"]), np.array(before["tokens"]))
            else:

                def after_batch(count: int, base: int = done, what: str = f"evaluate: {name} on {domain}") -> None:
                    on_progress(what, base + count, total)

                model = model or load_model(checkpoint.folder)
                loss = found[name, domain] = score_text(
                    model, opened, windows, batch_size=batch_size, where=f"{name} on {domain}", after_batch=after_batch
                )
                kept.keep({"nats": loss.nats.tolist(), "tokens": loss.tokens.tolist()}, **decides)
            done += len(windows)
    return found


def text_scores(found: Losses, windows: Mapping[str, Windows]) -> tuple[DomainScore, ...]:
    """`found` as rows, each beside the first model's."""
    first: dict[str, TextLoss] = {}
    return tuple(
        _score(model, domain, loss, first.setdefault(domain, loss), windows[domain])
        for (model, domain), loss in found.items()
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
