"""How many processes there are and what each of them holds: decided and checked before any weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prismoe.errors import UsageError

__all__ = ["Layout", "launched"]


@dataclass(frozen=True)
class Layout:
    """`world` processes; each has its own rows of every batch.

    Attributes:
        world: number of processes.
        replicate: whole copies of the training state (HSDP). Parameters, gradients and moments are sharded over the
            world / replicate processes of one copy, which should be those of a node.
        experts: processes that share out whole experts (expert parallelism, within a copy): an expert's weights stay
            where they are and its tokens travel. 1: experts are sharded and gathered like everything else.
    """

    world: int = 1
    replicate: int = 1
    experts: int = 1

    @property
    def shard(self) -> int:
        """Processes that hold one copy of the dense parameters between them."""
        return self.world // self.replicate

    def check(self, *, batch_size: int, micro_batch_size: int, num_experts: int) -> None:
        """Whether these processes can train such batches of a model with `num_experts` (0: dense).

        Raises:
            UsageError: naming the setting that has to change.
        """
        if self.world % self.replicate:
            _refuse(f"{self.replicate} copies on {self.world} processes", "replicate", "a divisor of their number")
        if self.shard % self.experts:
            _refuse(
                f"experts over {self.experts} of the {self.shard} processes of a copy",
                "expert_parallel",
                f"a divisor of {self.shard}",
            )
        if self.experts > 1 and (not num_experts or num_experts % self.experts):
            found = f"{num_experts} experts over {self.experts} processes" if num_experts else "a dense model"
            _refuse(found, "expert_parallel", "1 or a divisor of the number of experts" if num_experts else "1")
        if batch_size % self.world:
            _refuse(f"{batch_size} sequences on {self.world} processes", "batch_size", f"a multiple of {self.world}")
        rows = batch_size // self.world
        if micro_batch_size and rows % micro_batch_size:
            _refuse(
                f"{micro_batch_size} at a time of the {rows} sequences of a process",
                "micro_batch_size",
                f"a divisor of {rows}, or 0 for all at once",
            )

    def axis(self, shape: Sequence[int]) -> int:
        """Along which axis a parameter of `shape` is sharded.

        Rows, as PyTorch does it; but few experts on many processes would leave most of them with nothing: then the
        rows within each expert, where these divide.
        """
        if len(shape) < 3:
            return 0
        parts = self.shard // self.experts
        return int((shape[0] // self.experts) % parts != 0 and shape[1] % parts == 0)

    def held(self, shape: Sequence[int]) -> int:
        """Numbers of a parameter of `shape` that the first process holds: the most, where rows do not divide evenly."""
        rows, parts = shape[0], self.shard
        if len(shape) == 3:  # the experts of a layer
            rows, parts = rows // self.experts, parts // self.experts
            if self.axis(shape):
                return rows * shape[1] // parts * shape[2]
        return -(-rows // parts) * math.prod(shape[1:])

    def describe(self) -> dict[str, int]:
        """JSON-able, for receipts and checkpoints."""
        return {"world": self.world, "replicate": self.replicate, "expert_parallel": self.experts}


def _refuse(found: str, setting: str, needed: str) -> None:
    raise UsageError(found, where=f"pretrain.{setting}", needed=needed)


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, int, int]:
    """Rank, number of processes, rank on this machine and number on it, as torchrun says them; (0, 1, 0, 1) alone."""
    rank, world, local_rank, here = (int(environment.get(name, default)) for name, default in _VARIABLES)
    return rank, world, local_rank, here


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
