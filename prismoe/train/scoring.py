"""Language-model loss of a model on held-out text, without any router term, summed by document."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prismoe.data.shards import Domain, Windows
from prismoe.errors import NumericalError
from prismoe.train.head import text_loss, token_losses

__all__ = ["ALONE", "Share", "TextLoss", "score_text", "token_losses"]

Window = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Share:
    """This process among `world` that score the same text; `total` adds a tensor up over all of them."""

    rank: int = 0
    world: int = 1
    device: torch.device | str = "cpu"
    total: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor


ALONE = Share()


@dataclass(frozen=True, eq=False)
class TextLoss:
    """Summed loss in nats and number of scored tokens of each document."""

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean loss a token, in nats."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float | None:
        """Standard error of `loss` with documents as the independent units (ratio estimator: they differ in length).

        None for a single document: nothing can be said.
        """
        count = len(self.nats)
        if count < 2:
            return None
        residuals = self.nats - self.loss * self.tokens
        return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / self.tokens.sum())


def score_text(
    model: Any,
    domain: Domain,
    windows: Windows,
    *,
    batch_size: int,
    where: str,
    after_batch: Callable[[int], None] = lambda done: None,
    share: Share = ALONE,
) -> TextLoss:
    """Score `windows` of the held-out split of `domain`, windows of one length `batch_size` at a time.

    `after_batch` is called with the number of windows done, 0 after a batch that does not count; it may raise to stop.
    Several processes take turns with the batches. A sharded model needs all of them in every forward pass, so those
    whose turn does not come at the very end compute the last batch along and do not count it.

    Raises:
        NumericalError: a loss is not finite; `where` names model and text.
    """
    documents = np.searchsorted(domain.ends("heldout")[:, 0], windows.spans[:, 0], side="right")
    nats, tokens = np.zeros(windows.num_documents), np.zeros(windows.num_documents, np.int64)
    done = 0
    was_training = model.training
    model.eval()
    try:
        for turn in _turns(_batches(windows, batch_size), share.world):
            number = min(share.rank, len(turn) - 1)
            batch, counts = turn[number], share.rank < len(turn)
            ids_BT, labels_BT = (
                torch.from_numpy(np.stack(column)).to(share.device) for column in zip(*batch, strict=True)
            )
            with torch.no_grad():
                loss_B = text_loss(model, ids_BT, labels_BT, num_tokens=1.0)[1].double().sum(dim=1)
            if counts:
                first = done + sum(len(other) for other in turn[:number])
                rows = documents[first : first + len(batch)]
                np.add.at(nats, rows, loss_B.cpu().numpy())
                np.add.at(tokens, rows, (labels_BT[:, 1:] != -100).sum(dim=1).cpu().numpy())
            done += sum(len(other) for other in turn)
            after_batch(done if counts else 0)
    finally:
        model.train(was_training)
    nats, tokens = (share.total(torch.from_numpy(found)).numpy() for found in (nats, tokens))
    if not np.isfinite(nats).all():
        raise NumericalError(
            "held-out loss is not finite", where=where, hint="a weight is not, or training has diverged"
        )
    return TextLoss(nats, tokens)


def _turns(batches: Iterable[list[Window]], world: int) -> Iterator[list[list[Window]]]:
    several = iter(batches)
    while turn := list(islice(several, world)):
        yield turn


def _batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    # Padding instead would be no faster on a CPU (measured), and routers would see the padding.
    for _, run in groupby(windows, key=lambda window: len(window[0])):
        while batch := list(islice(run, size)):
            yield batch
