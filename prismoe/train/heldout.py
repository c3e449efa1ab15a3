"""Held-out loss of every domain while a model trains, shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from prismoe.data.mixture import Mixture
from prismoe.data.shards import heldout_windows
from prismoe.progress import Progress
from prismoe.train.engine import Engine
from prismoe.train.engine.placement import gather_no_more
from prismoe.train.routers import Router
from prismoe.train.routing import LoadMeter
from prismoe.train.scoring import Share, score_text
from prismoe.train.settings import PretrainConfig

__all__ = ["LeftEarly", "heldout_losses"]


class LeftEarly(Exception):
    """Evaluation was left because a stop was requested."""


def heldout_losses(
    model: Any,
    mixture: Mixture,
    *,
    config: PretrainConfig,
    routers: list[Router],
    engine: Engine,
    autocast: Callable[[], AbstractContextManager[Any]],
    stop: Callable[[], bool],
    on_progress: Progress,
) -> dict[str, Any]:
    """Loss a token of every domain with its standard error, and the load of the routers over that text.

    Windows of one length make up a batch whatever the number of processes, so the result does not depend on it.

    Raises:
        LeftEarly: `stop` said so, in any process.
        NumericalError: a loss is not finite.
    """
    meter = LoadMeter(routers, total=engine.sum)
    share = Share(engine.rank, engine.world, engine.device, engine.sum)
    heldout: dict[str, Any] = {}

    def after_batch(done: int) -> None:
        if done:
            meter.add()
        if engine.any(stop()):
            raise LeftEarly

    try:
        for domain in mixture.domains:
            name = domain.name
            engine.at(f"held-out loss: {name}")
            on_progress(f"held-out loss: {name}", len(heldout), len(mixture.names))
            windows = heldout_windows(domain, seq_len=config.seq_len, max_tokens=config.eval_tokens)
            size = config.micro_batch_size or config.batch_size // engine.world
            with autocast():
                found = score_text(
                    model,
                    domain,
                    windows,
                    batch_size=size,
                    where=f"held-out {name}",
                    after_batch=after_batch,
                    share=share,
                )
            heldout[name] = {"loss": found.loss, "standard_error": found.standard_error, "tokens": windows.num_tokens}
    finally:
        gather_no_more(model)
    on_progress("held-out loss", len(heldout), len(heldout))
    return {"heldout": heldout, **meter.result()}
