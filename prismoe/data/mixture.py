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

from prismoe.data.permutation import floor_sum, permute, round_keys, splitmix
from prismoe.data.shards import IGNORED, Domain
from prismoe.data.weights import resolve_weights
from prismoe.errors import InputError, PrismoeError, UsageError

__all__ = ["Batch", "DomainShare", "Mixture"]

IdArray = npt.NDArray[np.int64]
_UNIT = 1 << 48  # weights and offsets are integers of this unit, so that counting is exact
_GOLDEN = 173961102589771  # _UNIT / golden ratio, made odd: the rotation visits every offset


@dataclass(frozen=True, eq=False)
class Batch:
    """One step of one rank.

    `labels` stand at the position of their token, as stock `transformers` models take them (the model shifts by
    one), and are -100 where nothing is to be learned. `domain_ids` index `Mixture.names`. `position_ids` count from 0
    anew at each document where attention is to stay within documents (`attend="document"`), else they are None.
    """

    input_ids: IdArray  # [B, T]
    labels: IdArray  # [B, T]
    domain_ids: IdArray  # [B]
    position_ids: IdArray | None = None  # [B, T]


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
        self._offset = int(round_keys("offset", seed)[0]) % _UNIT
        self._keys: dict[tuple[int, int], npt.NDArray[np.uint64]] = {}
        self._segments: list[_Segment] = []
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
        domain_ids, windows = self._plan(step)
        rows = slice(rank * self.batch_size // world, (rank + 1) * self.batch_size // world)
        return self._read(domain_ids[rows], windows[rows])

    def check(self, num_steps: int) -> None:
        """Refuse a run of `num_steps` that would read a domain more than `max_epochs` times, before it starts.

        Raises:
            UsageError: naming the first such domain and the step at which it would run out.
        """
        over = self.counts(num_steps) > self.max_epochs * self._num_windows
        if not over.any():
            return
        first = int(np.flatnonzero(over)[0])
        low, high = 0, num_steps
        while high - low > 1:
            middle = (low + high) // 2
            if (self.counts(middle) > self.max_epochs * self._num_windows)[first]:
                high = middle
            else:
                low = middle
        epochs = self.counts(num_steps)[first] / self._num_windows[first]
        raise UsageError(
            f"{num_steps} steps read it {epochs:.1f} times, over max_epochs {self.max_epochs:g} from step {low} on",
            where=f"domain {self.names[first]}",
            hint="give it more text or less weight, take fewer steps, or raise max_epochs",
        )

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
                epochs=float(counts[g] / self._num_windows[g]),
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

    def _plan(self, step: int) -> tuple[IdArray, IdArray]:
        """Domain and window number, [B] each, of the global batch."""
        before, after = self.counts(step), self.counts(step + 1)
        if (after > self.max_epochs * self._num_windows).any():
            self.check(step + 1)
        counts = after - before
        row_keys = splitmix(np.arange(self.batch_size, dtype=np.uint64) + round_keys("rows", self.seed, step)[0])
        domain_ids = np.repeat(np.arange(len(counts)), counts)[np.argsort(row_keys, kind="stable")]
        # The n-th row of a domain, counted from the start of the run, is its n-th draw.
        number = np.empty(self.batch_size, np.int64)
        number[np.argsort(domain_ids, kind="stable")] = np.arange(self.batch_size) + np.repeat(
            before - np.cumsum(counts) + counts, counts
        )
        size = self._num_windows[domain_ids]
        epochs, index = np.divmod(number, size)
        keys = np.stack([self._pass_keys(int(g), int(epoch)) for g, epoch in zip(domain_ids, epochs, strict=True)])
        windows = permute(index.astype(np.uint64), size_N=size.astype(np.uint64), keys_NR=keys)
        return domain_ids, windows.astype(np.int64)

    def _pass_keys(self, domain: int, epoch: int) -> npt.NDArray[np.uint64]:
        if (domain, epoch) not in self._keys:
            self._keys[domain, epoch] = round_keys("windows", self.seed, self.names[domain], epoch)
        return self._keys[domain, epoch]

    def _read(self, domain_ids: IdArray, windows: IdArray) -> Batch:
        input_ids = np.empty((len(windows), self.seq_len), np.int64)
        masked = []  # rows with ids at the front that the window before has already given
        begins = []
        for row, (g, window) in enumerate(zip(domain_ids.tolist(), windows.tolist(), strict=True)):
            start = window * self.seq_len
            begin = min(start, self.domains[g].num_tokens - self.seq_len)
            input_ids[row] = self._tokens[g][begin : begin + self.seq_len]
            begins.append(begin)
            if begin < start:
                masked.append((row, start - begin))
        labels = input_ids.copy()
        for row, count in masked:
            labels[row, :count] = IGNORED
        if self._ends is None:
            return Batch(input_ids=input_ids, labels=labels, domain_ids=domain_ids)
        position_ids = np.tile(np.arange(self.seq_len), (len(windows), 1))
        for row, (g, begin) in enumerate(zip(domain_ids.tolist(), begins, strict=True)):
            first, last = np.searchsorted(self._ends[g], [begin + 1, begin + self.seq_len])
            starts = self._ends[g][first:last] - begin  # of the documents that begin inside the window
            labels[row, starts] = IGNORED
            lengths = np.diff(starts, prepend=0, append=self.seq_len)
            position_ids[row] -= np.repeat(np.concatenate([[0], starts]), lengths)
        return Batch(input_ids=input_ids, labels=labels, domain_ids=domain_ids, position_ids=position_ids)


@dataclass(frozen=True, eq=False)
class _Segment:
    """Steps from `step` on under one set of weights.

    `drawn` [G] is what was drawn before, less what these weights would have drawn in those steps.
    """

    step: int
    weights: dict[str, float]
    boundaries: list[int]  # cumulative weights in units, one per domain
    drawn: IdArray


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
