"""Language-model loss of a model on windows of tokens, without any router term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from prismoe.errors import NumericalError

__all__ = ["WindowScores", "score_windows", "token_losses"]

Window = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, eq=False)
class WindowScores:
    """Summed loss in nats and number of scored tokens of each window, in order."""

    nats: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean loss a token, in nats."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        """Standard error of `loss` over windows (ratio estimator: windows may differ in length); 0 for one window."""
        count = len(self.nats)
        if count < 2:
            return 0.0
        residuals = self.nats - self.loss * self.tokens
        return float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / self.tokens.sum())


def token_losses(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Loss in nats of token t+1 given the logits at t, [B, T-1] in float32; 0 where the label is -100."""
    flat = F.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=-100, reduction="none"
    )
    return flat.view(labels_BT.shape[0], -1)


def score_windows(
    model: Any,
    windows: Iterable[Window],
    *,
    batch_size: int,
    where: str = "",
    after_batch: Callable[[int], None] = lambda done: None,
) -> WindowScores:
    """Score windows (ids and labels `[T]` each; neighbours of one length go through the model together).

    `after_batch` is called with the number of windows done; it may raise to stop.

    Raises:
        NumericalError: a loss is not finite; `where` names the text.
    """
    nats: list[npt.NDArray[np.float64]] = []
    tokens: list[npt.NDArray[np.int64]] = []
    done = 0
    was_training = model.training
    model.eval()
    try:
        for batch in _batches(windows, batch_size):
            ids_BT, labels_BT = (torch.from_numpy(np.stack(column)) for column in zip(*batch, strict=True))
            with torch.inference_mode():
                logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
                loss_B = token_losses(logits_BTV, labels_BT).double().sum(dim=1)
            if not torch.isfinite(loss_B).all():
                raise NumericalError("loss is not finite", where=where, hint="the model's weights have diverged")
            nats.append(loss_B.numpy())
            tokens.append((labels_BT[:, 1:] != -100).sum(dim=1).numpy())
            done += len(batch)
            after_batch(done)
    finally:
        model.train(was_training)
    if not nats:
        return WindowScores(np.zeros(0), np.zeros(0, np.int64))
    return WindowScores(np.concatenate(nats), np.concatenate(tokens))


def _batches(windows: Iterable[Window], size: int) -> Iterator[list[Window]]:
    for _, run in groupby(windows, key=lambda window: len(window[0])):
        while batch := list(islice(run, size)):
            yield batch
