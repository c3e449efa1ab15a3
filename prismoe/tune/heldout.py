"""Loss on held-out conversations, and the load of the routers over them: before tuning and after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from prismoe.errors import NumericalError
from prismoe.progress import Progress
from prismoe.train.routers import Router
from prismoe.train.routing import LoadMeter
from prismoe.train.scoring import TextLoss, token_losses
from prismoe.tune.render import Rendered
from prismoe.tune.watch import check_run

__all__ = ["heldout_losses", "laid_out"]


def laid_out(rows: Sequence[Rendered]) -> dict[str, torch.Tensor]:
    """Conversations one behind the other in one row [1, T]: ids, labels (-100 where nothing is learned) and positions
    that begin anew with each. The first label of a conversation is -100: the one before it must not predict it."""
    ids_T = np.concatenate([row.input_ids_T for row in rows]).astype(np.int64)
    labels_T = np.where(np.concatenate([row.supervised_T for row in rows]), ids_T, -100)
    positions_T = np.concatenate([np.arange(len(row.input_ids_T)) for row in rows])
    labels_T[positions_T == 0] = -100
    found = {"input_ids": ids_T, "labels": labels_T, "position_ids": positions_T}
    return {name: torch.from_numpy(array)[None] for name, array in found.items()}


@torch.no_grad()
def heldout_losses(
    model: Any,
    rows: Sequence[Rendered],
    *,
    seq_len: int,
    routers: Sequence[Router],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    apart: bool,
    stop: Callable[[], bool] = lambda: False,
    on_progress: Progress,
) -> dict[str, Any] | None:
    """Mean loss a supervised token in nats with its standard error (conversations are the units), and the routers'
    load; None when `stop` said so on the way.

    `apart`: the model keeps conversations apart that lie in one row, so that `seq_len` ids are computed at once.

    Raises:
        NumericalError: a loss is not finite.
    """
    meter = LoadMeter(routers)
    nats, tokens = [], []
    done = 0
    training = model.training
    model.eval()
    try:
        for group in _groups(rows, seq_len if apart else 0):
            if stop():
                return None
            on_progress("held-out conversations", done, len(rows))
            batch = {name: tensor.to(device) for name, tensor in laid_out(group).items()}
            labels = batch.pop("labels")
            with autocast():
                loss_T = token_losses(model(**batch, use_cache=False).logits, labels)[0].double()
            check_run(routers)
            meter.add()
            ends = np.cumsum([len(row.input_ids_T) for row in group])
            # loss_T[t] is that of token t + 1, and the first one of each conversation is not scored.
            starts = np.concatenate([[0], ends[:-1]])
            for first, last in zip(starts, ends, strict=True):
                nats.append(float(loss_T[first : last - 1].sum()))
                tokens.append(int((labels[0, first:last] != -100).sum()))
            done += len(group)
    finally:
        model.train(training)
    on_progress("held-out conversations", done, len(rows))
    found = TextLoss(np.array(nats), np.array(tokens, np.int64))
    if not np.isfinite(found.nats).all():
        raise NumericalError("held-out loss is not finite", where="held-out conversations")
    scores = {"loss": found.loss, "standard_error": found.standard_error}
    return {**scores, "conversations": len(rows), "tokens": int(found.tokens.sum()), **meter.result()}


def _groups(rows: Sequence[Rendered], seq_len: int) -> list[list[Rendered]]:
    """In order, as many as fit into `seq_len` ids; one by one where it is 0."""
    groups: list[list[Rendered]] = []
    room = 0
    for row in rows:
        size = len(row.input_ids_T)
        if size > room:
            groups.append([])
            room = max(seq_len, size)
        groups[-1].append(row)
        room = room - size if seq_len else 0
    return groups
