"""The experts of one layer as their files hold them, compared block by block in float64. NumPy alone.

A folded scale is taken out where a plan says it, so that an untouched expert is its dense neurons.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import FFN, Checkpoint
from prismoe.densify.expertblocks import ExpertBlock, Parts
from prismoe.errors import InputError
from prismoe.layerplan import LayerPlan

__all__ = ["MOST_SAMPLED", "Experts", "sample_size"]

MOST_SAMPLED = 64
"""Neurons of an expert that are looked for among another's."""
SAMPLE_BYTES = 256 << 20
BLOCK = 1 << 20  # numbers of an expert in memory at a time, as float64

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


def sample_size(num_experts: int, hidden_size: int) -> int:
    """Neurons of each expert that are sampled: `MOST_SAMPLED`, less where those of all experts take too much memory."""
    return max(8, min(MOST_SAMPLED, SAMPLE_BYTES // (num_experts * 3 * hidden_size * 4)))


@dataclass(frozen=True, eq=False)
class Experts:
    """The routed experts of a layer. `factors` [part] is what each stored neuron was multiplied by; `index` [E, n] are
    the dense neurons of an expert's first n places, None where no plan says it.
    """

    checkpoint: Checkpoint
    block: ExpertBlock
    factors: dict[str, Floats]
    index: npt.NDArray[np.int32] | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, block: ExpertBlock, plan: LayerPlan | None) -> Experts:
        """Raises InputError where experts of one layer differ in width, or the plan is another model's."""
        where = f"{checkpoint.folder}: layer {block.layer}"
        widths = {block.width(expert) for expert in range(block.num_experts)}
        if len(widths) > 1:
            raise InputError(f"experts {sorted(widths)} wide", where=where, needed="one width")
        (width,) = widths
        factors = {part: np.ones(width) for part in Parts}
        if plan is None:
            return cls(checkpoint, block, factors, None)
        index = plan.experts
        own = plan.factors
        if len(plan.shared) and block.num_blocks == block.num_experts:  # absorbed: see `lower`
            own = {"gate": own["gate"], "up": own["up"] * own["down"], "down": 1.0}
            index = np.concatenate([index, np.broadcast_to(plan.shared, (len(index), len(plan.shared)))], axis=1)
        if len(index) != block.num_experts or index.shape[1] > width:
            raise InputError(
                f"a plan of {len(index)} experts with {index.shape[1]} neurons",
                where=where,
                needed=f"{block.num_experts} with at most {width}",
                hint="the plan is another model's",
            )
        for part, factor in own.items():
            factors[part][: plan.experts.shape[1]] = factor
        return cls(checkpoint, block, factors, np.asarray(index, np.int32))

    @property
    def count(self) -> int:
        return self.block.num_experts

    def matrix(self, part: str, expert: int) -> Array:
        """[W, D] gate or up, [D, W] down, a view of the file."""
        return (
            self.block.columns(self.checkpoint, expert)
            if part == "down"
            else self.block.rows(self.checkpoint, part, expert)
        )

    def blocks(self, part: str) -> Iterator[tuple[slice, list[Floats]]]:
        """Some rows of one matrix of every expert at a time, as float64, factors taken out."""
        rows, columns = self.matrix(part, 0).shape
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            at = slice(start, min(rows, start + step))
            yield at, [self._plain(part, self.matrix(part, expert)[at], at) for expert in range(self.count)]

    def _plain(self, part: str, stored: Array, at: slice) -> Floats:
        factor = self.factors[part]
        plain: Floats = stored.astype(np.float64) / (factor if part == "down" else factor[at, None])
        return plain

    def cosines(self) -> Floats:
        """[E, E] cosine of all weights of every two experts; NaN where one is all zeros."""
        gram = np.zeros((self.count, self.count))
        for part in Parts:
            for _, rows in self.blocks(part):
                flat = np.stack([block.ravel() for block in rows])
                gram += flat @ flat.T
        return _cosine(gram, np.sqrt(np.outer(gram.diagonal(), gram.diagonal())))

    def matched(self, most: int) -> Floats:
        """[E, E] mean over at most `most` neurons of the row's expert of the best cosine with one of the column's.

        Neurons are spread evenly; zero ones, which fill up a width, are left out of both.
        """
        samples = []
        for expert in range(self.count):
            real = self._real(expert)
            samples.append(self._neurons(expert, real[np.linspace(0, len(real) - 1, min(most, len(real))).astype(int)]))
        sizes = [len(sample) for sample in samples]
        stacked = np.concatenate(samples)
        found = np.full((self.count, self.count), np.nan)
        step = max(1, BLOCK // (3 * self.block.hidden_size))
        for other in range(self.count):
            best = np.full(len(stacked), -np.inf, np.float32)
            real = self._real(other)
            for start in range(0, len(real), step):
                neurons = self._neurons(other, real[start : start + step])
                np.maximum(best, (stacked @ neurons.T).max(axis=1), out=best)
            for expert, part in enumerate(np.split(best, np.cumsum(sizes)[:-1])):
                if len(part) and len(real):
                    found[expert, other] = min(1.0, float(part.mean(dtype=np.float64)))
        return found

    def against(self, ffn: FFN) -> Floats:
        """[E] cosine with the dense neurons of the plan; without one, with the whole FFN, place by place.

        Raises:
            InputError: no plan, and experts that are not as wide as the dense FFN.
        """
        dense: dict[str, Array] = {"gate": ffn.gate_FD, "up": ffn.up_FD, "down": ffn.down_DF}
        index = self.index
        if index is None:
            width = self.block.width(0)
            if width != len(ffn.gate_FD):
                raise InputError(
                    "no moe.plan, which says whose neurons an expert holds",
                    where=str(self.checkpoint.folder),
                    needed=f"it, or experts of all {len(ffn.gate_FD)} neurons (they have {width})",
                )
            index = np.broadcast_to(np.arange(width, dtype=np.int32), (self.count, width))
        sums = np.zeros((3, self.count))  # expert · dense, and both squares
        for part in Parts:
            for at, rows in self.blocks(part):
                for expert, (now, ids) in enumerate(zip(rows, index, strict=True)):
                    # Places behind the plan's are zeros, with nothing to be compared with.
                    was = dense[part][at][:, ids] if part == "down" else dense[part][ids[at]]
                    was = was.astype(np.float64)
                    own = now[:, : was.shape[1]] if part == "down" else now[: len(was)]
                    sums[:, expert] += (own * was).sum(), (now * now).sum(), (was * was).sum()
        return _cosine(sums[0], np.sqrt(sums[1] * sums[2]))

    def moved(self, before: Experts) -> Floats:
        """[E] ‖now - before‖ / ‖before‖ over all weights of an expert; both have the same sizes."""
        sums = np.zeros((2, self.count))
        for part in Parts:
            for (_, now), (_, was) in zip(self.blocks(part), before.blocks(part), strict=True):
                for expert, (new, old) in enumerate(zip(now, was, strict=True)):
                    sums[:, expert] += ((new - old) ** 2).sum(), (old * old).sum()
        return _cosine(np.sqrt(sums[0]), np.sqrt(sums[1]))

    def _real(self, expert: int) -> npt.NDArray[np.intp]:
        """Places of the neurons that are not zero: a gate row of zeros makes a neuron add nothing."""
        return np.flatnonzero(self.matrix("gate", expert).any(axis=1))

    def _neurons(self, expert: int, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
        """[n, 3D] unit vectors of neurons: gate row, up row and down column."""
        rows = [self.matrix(part, expert)[places] for part in ("gate", "up")]
        parts = [*rows, self.matrix("down", expert)[:, places].T]
        wide = np.concatenate(
            [
                part.astype(np.float64) / self.factors[name][places, None]
                for name, part in zip(Parts, parts, strict=True)
            ],
            axis=1,
        )
        unit: npt.NDArray[np.float32] = (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32)
        return unit


def _cosine(products: Floats, sizes: Floats) -> Floats:
    found: Floats = np.divide(products, sizes, out=np.full_like(products, np.nan), where=sizes > 0)
    return found
