"""The one place that knows of other processes: torch.distributed under torchrun, or nothing at all.

A process that nobody launched with others has no process group, and every method here is the identity: the training
loop is the same for one process and for many. Sums are over all processes. Policy is ours, machinery is PyTorch's:
`placement.py` shards a model with `fully_shard` (FSDP2), here are the few collectives that training itself needs.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch

from prismoe.errors import ResourceError, UsageError
from prismoe.train.engine.layout import Layout, launched
from prismoe.train.engine.watchdog import Watchdog

__all__ = ["Engine"]


class Engine:
    """This process among the others. `rank` 0 writes what is written once.

    Attributes:
        device: where the model lives.
        watchdog: is told the step and the phase, see `at`.
    """

    def __init__(self, layout: Layout, *, rank: int, device: torch.device, watchdog: Watchdog | None = None) -> None:
        self.layout, self.rank, self.device, self.watchdog = layout, rank, device, watchdog
        self.step = 0
        self.phase = "start"
        self.control: Any = None
        self._beside: Any = None

    @classmethod
    @contextmanager
    def start(cls, layout: Layout, *, device: str = "auto", timeout: float = 600.0) -> Iterator[Engine]:
        """Join the processes that torchrun launched (none: be alone) while the context is open.

        Leave no model behind in the frame that closes it: gloo must outlive what FSDP hangs on its threads.
        `timeout` is how many seconds any process may stay in one phase before the run is given up.

        Raises:
            UsageError: `device` is not there.
            ResourceError: the other processes do not come.
        """
        rank, world, local_rank, _ = launched()
        place = _device(device, local_rank)
        if world == 1 and place.type == "cpu":
            yield cls(layout, rank=0, device=place)
            return
        from torch import distributed

        backend = "nccl" if place.type == "cuda" else "gloo"
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        # torchrun keeps one store through restarts: processes must not read the addresses of those before them.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"prismoe/{attempt}/{next(_STARTED)}", _store(rank, world, timeout))
        # A collective waits longer than the watchdog takes to tell, who knows more: after 1.6 timeouts at most.
        patience = timedelta(seconds=3 * timeout)
        try:
            distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        except (RuntimeError, ValueError) as error:
            raise ResourceError(f"no process group ({_first_line(error)})", where=f"rank {rank}") from error
        watchdog = Watchdog(store, rank=rank, world=world, timeout=timeout)
        engine = cls(layout, rank=rank, device=place, watchdog=watchdog)
        # Flags and barriers travel between hosts: they never wait for a device.
        engine.control = distributed.new_group(backend="gloo", timeout=patience)
        engine._beside = distributed.new_group(backend="gloo", timeout=patience)
        watchdog.start()
        finished = False
        try:
            yield engine
            finished = True
        finally:
            gc.collect()
            if finished:
                engine.barrier("the end")
            watchdog.stop()
            distributed.destroy_process_group()

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def at(self, phase: str, step: int | None = None) -> None:
        """Say where this process is, for the watchdog and for errors."""
        self.phase, self.step = phase, self.step if step is None else step
        if self.watchdog is not None:
            self.watchdog.note(self.step, phase)

    def beside(self) -> Engine:
        """The same processes for a thread of its own: its flags and barriers do not meet those of training."""
        engine = Engine(self.layout, rank=self.rank, device=torch.device("cpu"))
        engine.control = self._beside
        return engine

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` added up over all processes, in place."""
        if self.world > 1:
            from torch import distributed

            distributed.all_reduce(tensor, group=None if tensor.device.type == self.device.type else self.control)
        return tensor

    def sum_with_gradient(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` added up over all processes, for losses: its gradient is added up likewise."""
        return _Sum.apply(tensor) if self.world > 1 else tensor  # type: ignore[no-untyped-call]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return self.each(flag)[0]

    def each(self, *flags: bool) -> list[bool]:
        """Of each flag whether it is set in any process: one collective."""
        return [count > 0 for count in self._summed(*map(int, flags))]

    def from_first(self, number: int) -> int:
        """What rank 0 says `number` is."""
        return self._summed(number if self.first else 0)[0]

    def _summed(self, *numbers: int) -> list[int]:
        if self.world == 1:
            return list(numbers)
        from torch import distributed

        sums = torch.tensor(numbers, dtype=torch.int64)
        distributed.all_reduce(sums, group=self.control)
        return sums.tolist()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The `tensor` of rank 0 on the CPU, in all processes; theirs is of its shape and is overwritten."""
        if self.world > 1:
            from torch import distributed

            tensor = tensor.contiguous()
            distributed.broadcast(tensor, src=0, group=self.control)
        return tensor

    def gather(self, row: torch.Tensor) -> torch.Tensor:
        """The rows that all processes give, in the order of ranks: [world, …] on the CPU."""
        if self.world == 1:
            return row[None]
        from torch import distributed

        rows = [torch.empty_like(row) for _ in range(self.world)]
        distributed.all_gather(rows, row, group=self.control)
        return torch.stack(rows)

    def barrier(self, phase: str) -> None:
        """Wait until all processes are here.

        Raises:
            ResourceError: some did not come in time, naming them.
        """
        self.at(phase)
        if self.world == 1:
            return
        from torch import distributed

        try:
            distributed.monitored_barrier(group=self.control, wait_all_ranks=True)
        except RuntimeError as error:
            raise self.lost(error) from error

    @contextmanager
    def losing_others(self) -> Iterator[None]:
        """A collective that fails because another process is gone is told as such."""
        try:
            yield
        except RuntimeError as error:
            if self.world > 1 and (type(error).__name__.startswith("Dist") or "gloo" in str(error)):
                raise self.lost(error) from error
            raise

    def lost(self, error: Exception) -> ResourceError:
        """What to say when a collective fails: another process is gone."""
        return ResourceError(
            f"rank {self.rank} lost the others ({_first_line(error)})",
            where=f"step {self.step}, {self.phase}",
            hint="see the first error of the other ranks; the same command continues from the last checkpoint",
        )


class _Sum(torch.autograd.Function):
    """Sum over processes; the gradients of all of them are summed on the way back."""

    @staticmethod
    def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
        return _summed(tensor)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return _summed(gradient)


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    from torch import distributed

    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    distributed.all_reduce(total)
    return total


def _device(name: str, local_rank: int) -> torch.device:
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UsageError(
            f"local rank {local_rank} of {torch.cuda.device_count()} devices",
            where="pretrain.device",
            needed="a device for each process",
            hint="fewer --nproc-per-node, or pretrain.device=cpu",
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


_STARTED = count()  # nor those of an earlier run of the same processes


@cache
def _store(rank: int, world: int, timeout: float) -> Any:
    from torch.distributed import HashStore, rendezvous  # type: ignore[attr-defined]

    if world == 1:
        return HashStore()
    started = time.monotonic()
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=timeout)))
    except (RuntimeError, ValueError) as error:
        waited = time.monotonic() - started
        raise ResourceError(
            f"the other {world - 1} processes did not come in {waited:.0f} s ({_first_line(error)})",
            where=f"rank {rank}",
            hint="launch all of them with torchrun",
        ) from error
    return store


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]
