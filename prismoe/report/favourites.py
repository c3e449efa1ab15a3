"""What an expert likes: tokens that it gets far more often than by its load alone, with text around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prismoe.report.page import Quote
from prismoe.routing.record import RoutingTrace

__all__ = ["Favourite", "favourites"]

LEAST = 4  # times that a token has to occur in the sample
AROUND = 7  # tokens shown on either side

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Favourite:
    """Token `token` occurs `times` in the sample and went to the expert `chosen` times; `lift` is that over the share
    of all tokens that the expert gets.
    """

    token: int
    times: int
    chosen: int
    lift: float
    domain: str
    quote: Quote


def favourites(trace: RoutingTrace, layer: int, *, most: int, decode: Decode) -> list[list[Favourite]]:
    """For every expert of a layer (an index into `trace.layers`) the tokens it likes most, the clearest first.

    Clearest is by (chosen - times·p) / √(times·p·(1-p)), p the share of sampled tokens that the expert gets: how many
    standard deviations a count is over that of an expert with no taste.
    """
    place = np.flatnonzero(trace.sample_tokens_GS.ravel() >= 0)
    tokens_N = trace.sample_tokens_GS.ravel()[place]
    experts_NK = trace.sample_experts_GSLK[:, :, layer].reshape(-1, trace.top_k)[place]
    if not len(place):
        return [[] for _ in range(trace.num_experts)]
    width = trace.sample_tokens_GS.shape[1]
    ids, inverse_N, times_V = np.unique(tokens_N, return_inverse=True, return_counts=True)
    found = []
    for expert in range(trace.num_experts):
        hit_N = (experts_NK == expert).any(axis=1)
        chosen_V = np.bincount(inverse_N[hit_N], minlength=len(ids))
        share = float(hit_N.mean())
        spread_V = np.sqrt(np.maximum(times_V * share * (1 - share), 1e-12))
        score_V = np.where(times_V >= LEAST, (chosen_V - times_V * share) / spread_V, -np.inf)
        best = [int(v) for v in np.argsort(-score_V, kind="stable")[:most] if score_V[v] > 2.0]
        rows = []
        for v in best:
            hits = place[hit_N & (inverse_N == v)]
            most_often = np.bincount(hits // width).argmax()  # the domain where the expert is given it most
            hits = hits[hits // width == most_often]
            domain, column = divmod(int(hits[len(hits) // 2]), width)
            quote = _quote(trace.sample_tokens_GS[domain], column, decode)
            lift = float(chosen_V[v] / times_V[v] / share)
            rows.append(Favourite(int(ids[v]), int(times_V[v]), int(chosen_V[v]), lift, trace.domains[domain], quote))
        found.append(rows)
    return found


def _quote(tokens_S: Any, place: int, decode: Decode) -> Quote:
    """The token with its neighbours of the same piece of text."""
    low, high = place, place + 1
    while low > 0 and place - low < AROUND and tokens_S[low - 1] >= 0:
        low -= 1
    while high < len(tokens_S) and high - place <= AROUND and tokens_S[high] >= 0:
        high += 1
    ids = [int(token) for token in tokens_S[low:high]]
    # Decoded together, because a piece alone loses the blank before it and half a character is none.
    before, through, whole = (decode(ids[:end]) for end in (place - low, place - low + 1, len(ids)))
    if not (through.startswith(before) and whole.startswith(through)):
        before, through, whole = before, before + decode([ids[place - low]]), ""
        whole = through + decode(ids[place - low + 1 :])
    return Quote(before, through[len(before) :], whole[len(through) :])
