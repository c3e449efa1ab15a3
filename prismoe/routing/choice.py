"""Which experts stay: the ones that tokens went to, by a trace. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError, UsageError
from prismoe.routing.record import RoutingTrace

__all__ = ["RECEIPT", "Choice", "Criterion", "choose_experts"]

RECEIPT = "pruning.json"  # beside the manifest, as the certificate is: it holds times and is no part of the model
Criterion = Literal["load", "importance"]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Choice:
    """`kept` [L, N]: experts of each layer that stay, ascending. `shares_GLE` sum to one over experts, of every domain
    of the trace; `trained` [G] says which domains decided: the training ones, or all where there are none.

    `wanted` [L]: with a threshold, how many experts of each layer reach it.
    """

    kept: npt.NDArray[np.int32]
    shares_GLE: Floats
    trained: npt.NDArray[np.bool_]
    wanted: tuple[int, ...] | None

    @property
    def removed_GL(self) -> Floats:
        """Share of routing that went to the experts that go, by domain and layer."""
        stays_LE = np.zeros(self.shares_GLE.shape[1:], bool)
        np.put_along_axis(stays_LE, self.kept, True, axis=1)
        removed: Floats = (self.shares_GLE * ~stays_LE).sum(axis=-1)
        return removed

    @property
    def mean_LE(self) -> Floats:
        """What was decided by: the mean over the domains that count, each of them alike."""
        mean: Floats = self.shares_GLE[self.trained].mean(axis=0)
        return mean


def choose_experts(
    trace: RoutingTrace,
    *,
    keep: int | Sequence[int] | None,
    threshold: float | None,
    criterion: Criterion,
    group: int = 1,
) -> Choice:
    """The experts of each layer with the greatest shares of `criterion`; of equal ones the first.

    Args:
        keep: how many, the same in every layer.
        threshold: instead of `keep`, the least share relative to a uniform one (1 is uniform, 0.5 half of it); the
            layer in which most experts reach it says how many every layer keeps.
        group: consecutive experts that stay or go together (virtual groups of a granular upcycling).

    Raises:
        UsageError: neither or both of them, more experts than there are, or fewer than are chosen at a time.
        InputError: a domain without tokens.
    """
    if (keep is None) == (threshold is None):
        raise UsageError(
            "keep and threshold are both set" if keep is not None else "neither keep nor threshold is set",
            where="prune-experts",
            needed="keep=N or threshold=SHARE",
        )
    if keep is not None and not isinstance(keep, int):
        raise UsageError(
            f"keep is {list(keep)}",
            where="prune-experts",
            needed="one number: stock architectures have one number of experts for all layers",
        )
    counts_GLE = np.asarray(trace.load_GLE if criterion == "load" else trace.importance_GLE, np.float64)
    totals_GL = counts_GLE.sum(axis=-1, keepdims=True)
    if not counts_GLE.size or not (totals_GL > 0).all():
        raise InputError("a domain that no expert got a token of", where="trace", hint="trace more text")
    shares_GLE = counts_GLE / totals_GL
    trained = np.array([kind == "train" for kind in trace.kinds])
    trained |= not trained.any()
    mean_LE = shares_GLE[trained].mean(axis=0)
    grouped_LV = mean_LE.reshape(len(mean_LE), -1, group).sum(axis=-1)
    wanted = None
    if threshold is not None:
        reached = (grouped_LV * grouped_LV.shape[1] >= threshold).sum(axis=1) * group
        wanted = tuple(int(count) for count in reached)
        keep = max(*wanted, trace.top_k, 2)
    assert isinstance(keep, int)
    if wanted is not None and keep == trace.num_experts:
        found = f"in some layer all {keep} experts have {threshold:g} of a uniform share"
        raise UsageError(found, where="prune-experts: threshold", needed="a higher one")
    _check(keep, trace, group)
    best_LV = np.sort(np.argsort(-grouped_LV, axis=1, kind="stable")[:, : keep // group], axis=1)
    kept = (best_LV[:, :, None] * group + np.arange(group)).reshape(len(best_LV), keep)
    return Choice(kept.astype(np.int32), shares_GLE, trained, wanted)


def _check(keep: int, trace: RoutingTrace, group: int) -> None:
    least, most = max(trace.top_k, 2), trace.num_experts - 1
    if not least <= keep <= most:
        why = f"{trace.top_k} are chosen for a token" if trace.top_k > 1 else "one expert is no choice"
        raise UsageError(f"keep is {keep}", where="prune-experts", needed=f"{least} to {most}: {why}")
    if keep % group:
        raise UsageError(f"keep is {keep}", where="prune-experts", needed=f"a multiple of {group}: its virtual groups")
