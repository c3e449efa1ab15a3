"""One command in several processes at once, as torchrun starts it: real ones, forked from what is imported already."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from tests.torture.processes import Finished, Running, start

NEEDED = ("torch.distributed.fsdp", "prismoe.train.checkpoints", "prismoe.train.loop", "prismoe.train.model")

__all__ = ["begin", "rank", "together"]


def begin(words: Sequence[str], *, world: int, log: Path, before: Callable[[], None] | None = None) -> list[Running]:
    """Start `prismoe WORDS` in `world` processes; `before` runs in each of them first and may look at its RANK.

    Rank r prints to `log`-r.out and `log`-r.err. One process is started as nobody would launch it.
    """
    for name in NEEDED:
        import_module(name)  # once, before the first fork
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    return [
        start(
            words,
            log=log.with_name(f"{log.name}-{rank}"),
            before=before,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def together(
    words: Sequence[str], *, world: int, log: Path, before: Callable[[], None] | None = None, timeout: float = 300
) -> list[Finished]:
    """`begin`, then wait for all of them; by rank."""
    return [running.wait(timeout) for running in begin(words, world=world, log=log, before=before)]


def rank() -> int:
    """That of this process."""
    return int(os.environ["RANK"])
