"""Where the experts of one layer lie in a mixture's tensors, read off the target that would write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError
from prismoe.recipe import Strand
from prismoe.target import Slot, Target

__all__ = ["ExpertBlock", "Parts", "expert_block", "look_alike"]

Parts = ("gate", "up", "down")
SAMPLED = 64  # neurons of each expert that are compared with every other expert's
ALIKE, SHARE = 0.9, 0.1  # cosine of both rows above which two neurons are one; share of such neurons that is no chance


@dataclass(frozen=True)
class _Place:
    """One matrix of one expert: rows `first`, … of `source` seen as rows of its last axis; `width` neurons."""

    source: str
    first: int
    width: int


@dataclass(frozen=True, eq=False)
class ExpertBlock:
    """The experts of one layer, routed ones first and the shared one, where there is one, last."""

    layer: int
    num_experts: int
    hidden_size: int
    places: dict[tuple[str, int], _Place]
    shared_factor: float

    @property
    def num_blocks(self) -> int:
        """Experts, the shared one counted."""
        return len(self.places) // len(Parts)

    def width(self, expert: int) -> int:
        """Stored neurons of an expert, zero ones included."""
        return self.places["gate", expert].width

    def strand(self, part: str, expert: int, *, count: int, factor: float) -> Strand:
        """The first `count` neurons of one matrix; the shared expert has a factor of its own."""
        place = self.places[part, expert]
        own = factor if expert < self.num_experts else 1.0 / self.shared_factor if part == "down" else 1.0
        return Strand(place.source, place.first, count, own)

    def rows(self, checkpoint: Checkpoint, part: str, expert: int) -> npt.NDArray[Any]:
        """[W, D] gate or up rows of an expert, a view of the file."""
        place = self.places[part, expert]
        stored = checkpoint.array(place.source)
        return stored.reshape(-1, stored.shape[-1])[place.first : place.first + place.width]

    def columns(self, checkpoint: Checkpoint, expert: int) -> npt.NDArray[Any]:
        """[D, W] down matrix of an expert, a view of the file."""
        place = self.places["down", expert]
        stored = checkpoint.array(place.source)
        return stored.reshape(-1, stored.shape[-1])[place.first : place.first + self.hidden_size, : place.width]

    def zero_tail(self, checkpoint: Checkpoint, expert: int) -> int:
        """Neurons at the end of an expert whose gate row is zero: silu(0) = 0, so they add nothing, trained or not."""
        gate = self.rows(checkpoint, "gate", expert)
        tail = 0
        while tail < len(gate) and not gate[len(gate) - 1 - tail].any():
            tail += 1
        return tail


def expert_block(checkpoint: Checkpoint, target: Target, layer: int) -> ExpertBlock | None:
    """The experts of a layer, or None where it is dense.

    Raises:
        InputError: a tensor is missing or its shape is not that of the others.
    """
    if target.router.format(l=layer) not in checkpoint.tensors:
        return None
    num_experts, hidden = _shape(checkpoint, target.router.format(l=layer), 2)
    places: dict[tuple[str, int], _Place] = {}
    for slot in target.experts:
        for expert in range(num_experts):
            places |= _places(checkpoint, slot, layer, expert, num_experts=num_experts)
    if target.shared and target.shared[0].key.format(l=layer) in checkpoint.tensors:
        for slot in target.shared:
            places |= _places(checkpoint, slot, layer, num_experts, num_experts=0)
    for expert in range(len(places) // len(Parts)):
        widths = {part: places[part, expert].width for part in Parts}
        if len(set(widths.values())) > 1:
            where = f"{checkpoint.folder}: {places['gate', expert].source}"
            raise InputError(f"widths {widths} of expert {expert}", where=where, needed="one width")
    return ExpertBlock(layer, num_experts, hidden, places, target.shared_factor)


def _places(
    checkpoint: Checkpoint, slot: Slot, layer: int, expert: int, *, num_experts: int
) -> dict[tuple[str, int], _Place]:
    """The matrices of one expert in one slot; `num_experts` 0: the shared expert, whose tensor is its own."""
    key = slot.key.format(l=layer, e=expert)
    fused = "{e}" not in slot.key and num_experts > 0
    *experts, rows, columns = _shape(checkpoint, key, 3 if fused else 2)
    if fused and experts != [num_experts]:
        raise InputError(f"{experts[0]} experts", where=f"{checkpoint.folder}: {key}", needed=str(num_experts))
    first = expert * rows if fused else 0
    if slot.parts == ("down",):
        return {("down", expert): _Place(key, first, columns)}
    width = rows // len(slot.parts)
    return {(part, expert): _Place(key, first + number * width, width) for number, part in enumerate(slot.parts)}


def _shape(checkpoint: Checkpoint, key: str, axes: int) -> tuple[int, ...]:
    info = checkpoint.tensors.get(key)
    if info is None or len(info.shape) != axes or 0 in info.shape:
        found = "missing" if info is None else f"shape {list(info.shape)}"
        raise InputError(found, where=f"{checkpoint.folder}: {key}", needed=f"a tensor of {axes} axes")
    return info.shape


def look_alike(checkpoint: Checkpoint, block: ExpertBlock) -> tuple[int, int] | None:
    """Two experts that have neurons in common, from a sample; training moves copies apart, but not this far."""
    samples: list[tuple[int, list[npt.NDArray[np.float32]]]] = []
    for expert in range(block.num_experts):
        gate, up = (_unit(block.rows(checkpoint, part, expert)) for part in ("gate", "up"))
        for first, (gates, ups) in samples:
            if len(gates):
                both = np.minimum(gates @ gate.T, ups @ up.T)
                if (both.max(axis=1) > ALIKE).mean() > SHARE:
                    return first, expert
        real = np.flatnonzero(gate.any(axis=1))
        some = real[np.linspace(0, len(real) - 1, min(SAMPLED, len(real))).astype(np.intp)]
        samples.append((expert, [gate[some], up[some]]))
    return None


def _unit(rows: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    wide: npt.NDArray[np.float32] = np.array(rows, np.float32)
    lengths: npt.NDArray[np.float32] = np.sqrt((wide * wide).sum(axis=1, keepdims=True))
    lengths[lengths == 0] = 1
    wide /= lengths
    return wide
