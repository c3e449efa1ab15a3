"""One command in several processes at once, as torchrun starts it: real ones, forked from what is imported already."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from tests.torture.processes import Finished, Running, start

NEEDED = ("torch.distributed.fsdp", "prismoe.train.checkpoints", "prismoe.train.loop", "prismoe.train.model")

EVERY = 5  # steps between checkpoints of runs that lose a process

__all__ = ["EVERY", "begin", "die", "rank", "ready", "together", "whole"]


def ready() -> None:
    """Import what several processes need beside what one needs, before any of them is forked."""
    for name in NEEDED:
        import_module(name)


def begin(words: Sequence[str], *, world: int, log: Path, before: Callable[[], None] | None = None) -> list[Running]:
    """Start `prismoe WORDS` in `world` processes; `before` runs in each of them first and may look at its RANK.

    Rank r prints to `log`-r.out and `log`-r.err. One process is started as nobody would launch it.
    """
    ready()
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


def whole(checkpoints: Path, *, before: int) -> None:
    """Wait until the checkpoint of the last step before `before` that `EVERY` divides is written (not if it is 0)."""
    step = (before - 1) // EVERY * EVERY
    while step and not (checkpoints / f"step-{step:08d}/manifest.json").exists():
        time.sleep(0.005)


def die() -> None:
    """As the kernel ends a process that took too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)
