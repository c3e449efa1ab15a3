"""Packed sequences from weighted domains: a batch is a pure function of (seed, step, weight history).

How, with no state but the history:

- *Which domains.* Row positions (k + u) / batch_size, k = 0, 1, …, fall into the cumulative weights (stratified
  sampling), so each batch holds every domain's share rounded up or down. The offset u moves by the golden ratio from
  step to step, so the roundings even out: the achieved count stays within a few sequences of the requested one for
  ever, and the count at any step has a closed form (a floor sum, O(log)). Resume costs nothing at any position.
- *Which windows.* A domain is a stream of ids cut into windows of `seq_len`. Its n-th drawn window is the image of n
  under a keyed permutation (Feistel, cycle walking), a new one for each pass: without replacement, no shuffle table.
- *Changed weights* begin a new segment of the history. Counters carry on, so nothing repeats before a pass is over.
- *Ranks* compute the same plan and read their slice of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prismoe.data.packing import Batch, read_rows
from prismoe.data.permutation import floor_sum, permute, round_keys, splitmix
from prismoe.data.shards import Domain
from prismoe.data.weights import resolve_weights
from prismoe.errors import InputError, PrismoeError, UsageError

__all__ = ["Batch", "DomainShare", "Mixture"]

IdArray = npt.NDArray[np.int64]
_UNIT = 1 << 48  # weights and offsets are integers of this unit, so that counting is exact
_GOLDEN = 173961102589771  # _UNIT / golden ratio, made odd: the rotation visits every offset

_PLANNED_ROWS = 4096  # planned ahead: a step's plan alone costs as much as reading its rows


@dataclass(frozen=True)
class DomainShare:
    """Requested against achieved after some steps. Fractions are of sequences, which all have `seq_len` tokens."""

    name: str
    requested: float
    achieved: float
    sequences: int
    tokens: int
    epochs: float


class Mixture:
    """Sequences of `seq_len` tokens drawn from `domains` (their train splits) by `weights`.

    The only state is `history`, a JSON-able list of {"step", "weights"}; give it back to `restore` on resume.

    Args:
        domains: prepared with one tokenizer. Their order does not matter: the mixture sorts them by name.
        weights: fraction of tokens per domain name (0 leaves a domain out), or `uniform`, `proportional` or the
            name of a preset (`llama1`, `sheared-llama`).
        seq_len: tokens per sequence. The last window of a pass reaches back to be full; what it repeats has no label,
            so every token is learned from once a pass.
        batch_size: sequences per step over all ranks.
        seed: of the order; two seeds share no order.
        max_epochs: more passes over a domain than this are refused.
        attend: "sequence" packs documents end to end, and a token sees all that stands before it. "document" gives
            `position_ids` that begin anew with each document: stock `transformers` models, given these and no
            `attention_mask`, then attend within documents only. A document's first token has no label: what would
            predict it belongs to the document before.

    Raises:
        UsageError: weights that do not sum to 1, are negative or do not name exactly the domains; sizes below 1.
        InputError: domains of different tokenizers, or one shorter than a sequence.
    """

    def __init__(
        self,
        domains: Iterable[Domain],
        *,
        weights: Mapping[str, float] | str,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        max_epochs: float = 4.0,
        attend: Literal["sequence", "document"] = "sequence",
    ) -> None:
        self.domains = tuple(sorted(domains, key=lambda domain: domain.name))
        self.names = tuple(domain.name for domain in self.domains)
        self.seq_len, self.batch_size, self.seed, self.max_epochs = seq_len, batch_size, seed, max_epochs
        if seq_len < 2 or batch_size < 1:
            raise UsageError(f"seq_len {seq_len}, batch_size {batch_size}", needed="at least 2 and 1")
        _check_domains(self.domains)
        self._tokens = [
            domain.tokens("train").view(np.ndarray) for domain in self.domains
        ]  # a plain view slices faster
        self._ends = (
            None if attend == "sequence" else [domain.ends("train")[:, 0].view(np.ndarray) for domain in self.domains]
        )
        self._num_windows = np.array([-(-domain.num_tokens // seq_len) for domain in self.domains], np.int64)
        self._last_G = np.array([domain.num_tokens - seq_len for domain in self.domains], np.int64)
        self._offset = int(round_keys("offset", seed)[0]) % _UNIT
        self._keys: dict[tuple[int, int], npt.NDArray[np.uint64]] = {}
        self._segments: list[_Segment] = []
        self._planned: _Plan | None = None
        self.set_weights(0, weights)

    @property
    def history(self) -> list[dict[str, Any]]:
        """[{"step": first step, "weights": {name: fraction}}, …], oldest first."""
        return [{"step": segment.step, "weights": dict(segment.weights)} for segment in self._segments]

    def weights(self, step: int) -> dict[str, float]:
        """The weights that `step` is drawn with."""
        return dict(self._segment(step).weights)

    def set_weights(self, step: int, weights: Mapping[str, float] | str) -> None:
        """Draw from `step` on with other weights. Saying the same again for the same step changes nothing.

        Raises:
            UsageError: bad weights, or a step before (or other weights for) the newest entry of the history.
        """
        checked = resolve_weights(weights, self.domains)
        if self._segments:
            last = self._segments[-1]
            if step == last.step and checked == last.weights:
                return
            if step <= last.step:
                raise UsageError(f"weights for step {step}", needed=f"a step after {last.step}, where the history ends")
        for name, weight in checked.items():
            tokens = self.domains[self.names.index(name)].num_tokens
            if weight and tokens < self.seq_len:
                raise InputError(
                    f"{tokens} tokens of training text, less than one sequence of {self.seq_len}",
                    where=f"domain {name}",
                    hint="give it more text, a shorter seq_len or weight 0",
                )
        boundaries = _boundaries(checked, self.names)
        drawn = self.counts(step) - self._points(step, boundaries)
        self._segments.append(_Segment(step, checked, boundaries, drawn))
        self._planned = None  # what was planned for later steps has other weights now

    def restore(self, history: list[dict[str, Any]]) -> None:
        """Take over a saved `history`.

        Raises:
            UsageError: it does not begin at step 0, is out of order, or names other domains.
        """
        if not history or any(entry.keys() != {"step", "weights"} for entry in history) or history[0]["step"] != 0:
            raise UsageError("not a weight history", needed="a list of {step, weights} that begins at step 0")
        kept, self._segments = self._segments, []
        try:
            for entry in history:
                self.set_weights(entry["step"], entry["weights"])
        except PrismoeError:
            self._segments = kept
            raise

    def counts(self, step: int) -> IdArray:
        """[G] sequences drawn from each domain before `step`; the same cost for any step."""
        if not self._segments:
            return np.zeros(len(self.names), np.int64)
        segment = self._segment(step)
        return segment.drawn + self._points(step, segment.boundaries)

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        """The sequences of `step` for one of `world` ranks: rows rank·B/world … of the global batch.

        Raises:
            UsageError: `world` does not divide `batch_size`, or a domain would be read more than `max_epochs` times.
        """
        if step < 0 or not 0 <= rank < world or self.batch_size % world:
            raise UsageError(
                f"step {step}, rank {rank} of {world}",
                needed=f"a step from 0 and a number of ranks that divides the batch of {self.batch_size}",
            )
        plan = self._plan(step)
        if plan.over_S[step - plan.first]:
            self.check(step + 1)
        rows = step - plan.first, slice(rank * self.batch_size // world, (rank + 1) * self.batch_size // world)
        return read_rows(
            self._tokens,
            plan.domain_ids_SB[rows],
            plan.begins_SB[rows],
            plan.skipped_SB[rows],
            seq_len=self.seq_len,
            ends=self._ends,
        )

    def check(self, num_steps: int) -> None:
        """Refuse a run of `num_steps` that would read a domain more than `max_epochs` times, before it starts.

        Raises:
            UsageError: naming the first such domain and the step at which it would run out.
        """
        over = self.counts(num_steps) > self.max_epochs * self._num_windows
        if not over.any():
            return
        first = int(np.flatnonzero(over)[0])
        low = self.full_at(self.names[first], num_steps)
        epochs = self.counts(num_steps)[first] / self._num_windows[first]
        raise UsageError(
            f"{num_steps} steps read it {epochs:.1f} times, over max_epochs {self.max_epochs:g} from step {low} on",
            where=f"domain {self.names[first]}",
            hint="give it more text or less weight, take fewer steps, or raise max_epochs",
        )

    def full_at(self, name: str, num_steps: int) -> int | None:
        """The first of `num_steps` steps that would read domain `name` more than `max_epochs` times, None if none."""
        g = self.names.index(name)
        limit = self.max_epochs * self._num_windows[g]
        if self.counts(num_steps)[g] <= limit:
            return None
        low, high = 0, num_steps
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.counts(middle)[g] > limit else (middle, high)
        return low

    def report(self, step: int) -> tuple[DomainShare, ...]:
        """Requested and achieved share of every domain over the steps before `step`."""
        counts = self.counts(step)
        stops = [min(segment.step, step) for segment in self._segments[1:]] + [step]
        spans = [max(0, stop - segment.step) for segment, stop in zip(self._segments, stops, strict=True)]
        return tuple(
            DomainShare(
                name=name,
                requested=math.fsum(
                    span * segment.weights[name] for span, segment in zip(spans, self._segments, strict=True)
                )
                / max(step, 1),
                achieved=int(counts[g]) / max(step * self.batch_size, 1),
                sequences=int(counts[g]),
                tokens=int(counts[g]) * self.seq_len,
                epochs=float(counts[g] / max(1, self._num_windows[g])),  # an empty domain has weight 0
            )
            for g, name in enumerate(self.names)
        )

    def _points(self, step: int, boundaries: list[int]) -> IdArray:
        """[G] how many row positions of steps 0 … step-1 lie between each cumulative weight and the one before.

        Step s has positions (k + u_s) / batch_size, u_s = frac(offset + s·golden). Below a boundary lie `whole` of
        them, and one more when u_s < part. That bracket, summed over s, is a difference of two floor sums.
        """
        shifted = self._offset + _UNIT  # keeps the terms of the second sum non-negative
        all_of_them = floor_sum(step, _UNIT, _GOLDEN, shifted)
        below = [0]
        for boundary in boundaries:
            whole, part = divmod(self.batch_size * boundary, _UNIT)
            extra = all_of_them - floor_sum(step, _UNIT, _GOLDEN, shifted - part) if part else 0
            below.append(step * whole + extra)
        return np.diff(below)

    def _segment(self, step: int) -> _Segment:
        return next((s for s in reversed(self._segments) if s.step <= step), self._segments[0])

    def _plan(self, step: int) -> _Plan:
        """Of `step` and of those after it under the same weights: together they cost far less than one by one."""
        if self._planned is None or not 0 <= step - self._planned.first < len(self._planned.over_S):
            self._planned = self._plan_from(step)
        return self._planned

    def _plan_from(self, step: int) -> _Plan:
        number = max(1, _PLANNED_ROWS // self.batch_size)
        segment = self._segment(step)
        later = [other.step for other in self._segments if other.step > max(step, segment.step)]
        steps = np.arange(step, min([step + number, *later]), dtype=np.uint64)
        offset_S = (np.uint64(self._offset) + steps * np.uint64(_GOLDEN)) % np.uint64(_UNIT)  # 2^64 is a multiple
        bounds = [divmod(self.batch_size * boundary, _UNIT) for boundary in segment.boundaries]
        whole_G, part_G = (np.array(column, np.uint64) for column in zip(*bounds, strict=True))
        below_SG = (whole_G + (offset_S[:, None] < part_G)).astype(np.int64)
        counts_SG = np.diff(below_SG, axis=1, prepend=0)
        after_SG = self.counts(step) + np.cumsum(counts_SG, axis=0)
        row_keys_S = np.array([round_keys("rows", self.seed, int(s))[0] for s in steps])
        row_keys_SB = splitmix(row_keys_S[:, None] + np.arange(self.batch_size, dtype=np.uint64))
        shape = row_keys_SB.shape

        def rows(values_SG: IdArray) -> IdArray:
            """Each domain's value once for each of its rows, domain after domain."""
            return np.repeat(values_SG.ravel(), counts_SG.ravel()).reshape(shape)

        domains_SG = np.broadcast_to(np.arange(len(self.names)), counts_SG.shape)
        ids_SB = np.take_along_axis(rows(domains_SG), np.argsort(row_keys_SB, axis=1, kind="stable"), axis=1)
        # The n-th row of a domain, counted from the start of the run, is its n-th draw.
        number_SB = np.empty(shape, np.int64)
        drawn_SB = np.arange(self.batch_size) + rows(after_SG - below_SG)
        np.put_along_axis(number_SB, np.argsort(ids_SB, axis=1, kind="stable"), drawn_SB, axis=1)
        size_SB = self._num_windows[ids_SB]
        epochs_SB, index_SB = np.divmod(number_SB, size_SB)
        passes, which = np.unique(epochs_SB.ravel() * len(self.names) + ids_SB.ravel(), return_inverse=True)
        keys = np.stack([self._pass_keys(int(code) % len(self.names), int(code) // len(self.names)) for code in passes])
        windows = permute(
            index_SB.ravel().astype(np.uint64), size_N=size_SB.ravel().astype(np.uint64), keys_NR=keys[which]
        )
        starts_SB = windows.astype(np.int64).reshape(shape) * self.seq_len
        begins_SB = np.minimum(starts_SB, self._last_G[ids_SB])
        return _Plan(
            first=step,
            over_S=(after_SG > self.max_epochs * self._num_windows).any(axis=1),
            domain_ids_SB=ids_SB,
            begins_SB=begins_SB,
            skipped_SB=starts_SB - begins_SB,
        )

    def _pass_keys(self, domain: int, epoch: int) -> npt.NDArray[np.uint64]:
        if (domain, epoch) not in self._keys:
            self._keys[domain, epoch] = round_keys("windows", self.seed, self.names[domain], epoch)
        return self._keys[domain, epoch]


@dataclass(frozen=True, eq=False)
class _Segment:
    """Steps from `step` on under one set of weights.

    `drawn` [G] is what was drawn before, less what these weights would have drawn in those steps.
    """

    step: int
    weights: dict[str, float]
    boundaries: list[int]  # cumulative weights in units, one per domain
    drawn: IdArray


@dataclass(frozen=True, eq=False)
class _Plan:
    """Where the rows of consecutive steps are read, and which steps would read a domain too often."""

    first: int
    over_S: npt.NDArray[np.bool_]
    domain_ids_SB: IdArray
    begins_SB: IdArray
    skipped_SB: IdArray  # ids at the front of a row that the window before has already given


def _boundaries(weights: Mapping[str, float], names: tuple[str, ...]) -> list[int]:
    total = sum(Fraction(weights[name]) for name in names)
    sums, running = [], Fraction(0)
    for name in names:
        running += Fraction(weights[name])
        sums.append(int(running * _UNIT / total))  # exact: the last is _UNIT, and weight 0 adds nothing
    return sums


def _check_domains(domains: tuple[Domain, ...]) -> None:
    if not domains:
        raise UsageError("a mixture of no domains")
    for first, second in pairwise(domains):
        if first.name == second.name:
            raise UsageError(f"two domains named {first.name!r}", where=f"{first.folder}, {second.folder}")
        if first.tokenizer_sha256 != second.tokenizer_sha256:
            raise InputError(
                f"prepared with another tokenizer than {first.folder}",
                where=str(second.folder),
                hint="prepare all domains with the model's own tokenizer",
            )
