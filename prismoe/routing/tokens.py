"""What each expert likes: the tokens that go to it more often than others do, shown in text that was really read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.folder import sha256_file
from prismoe.panics import read_tokenizer
from prismoe.routing.record import RoutingTrace

__all__ = ["Context", "Favourite", "favourite_tokens", "visible"]

Array = npt.NDArray[Any]
Decode = Callable[[Sequence[int]], str]
BROKEN = "\ufffd"  # what part of a character decodes to


@dataclass(frozen=True)
class Context:
    """A place of the sample where the token went to the expert; plain text, nothing in it but printable characters."""

    domain: str
    before: str
    token: str
    after: str


@dataclass(frozen=True)
class Favourite:
    """A token that a layer's expert gets: of its `count` occurrences in the sample `chosen` went there; `lift` is that
    share over the expert's share of all tokens.
    """

    layer: int
    expert: int
    token: int
    text: str
    lift: float
    count: int
    chosen: int
    contexts: tuple[Context, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def favourite_tokens(
    trace: RoutingTrace, tokenizer: str | Path, *, most: int = 8, contexts: int = 2, around: int = 8, least: int = 5
) -> list[Favourite]:
    """For each layer and expert in turn, the `most` tokens of highest lift among those with `least` occurrences.

    Only tokens that like the expert (lift above 1) are named; equals are ordered by their count, then by id.

    Args:
        trace: its sample is what is looked at.
        tokenizer: a model folder with `tokenizer.json`, or that file.
        contexts: places shown of each token, of different domains where there are, `around` tokens to either side.

    Raises:
        InputError: no tokenizer there, or not the one that the text was tokenised with.
    """
    whole = _read_tokenizer(Path(tokenizer), trace)
    flat_N = trace.sample_tokens_GS.reshape(-1)
    places_N = np.flatnonzero(flat_N >= 0)
    tokens_V, which_N, counts_V = np.unique(flat_N[places_N], return_inverse=True, return_counts=True)
    experts_NLK = trace.sample_experts_GSLK.reshape(-1, len(trace.layers), trace.top_k)[places_N]

    def decode(ids: Sequence[int]) -> str:
        return str(whole.decode(list(ids), skip_special_tokens=False))

    found = []
    for row, layer in enumerate(trace.layers):
        chosen_VE = np.zeros((len(tokens_V), trace.num_experts), np.int64)
        np.add.at(chosen_VE, (which_N[:, None], experts_NLK[:, row]), 1)
        share_E = chosen_VE.sum(axis=0) / max(1, len(places_N))
        for expert in range(trace.num_experts):
            if not share_E[expert]:
                continue
            chosen_V = chosen_VE[:, expert]
            lift_V = chosen_V / counts_V / share_E[expert]
            order = np.lexsort((tokens_V, -counts_V, -lift_V))
            for v in order[(counts_V[order] >= least) & (lift_V[order] > 1)][:most].tolist():
                token = int(tokens_V[v])
                there = places_N[(which_N == v) & (experts_NLK[:, row] == expert).any(axis=-1)]
                shown = _contexts(trace, there, decode, contexts=contexts, around=around)
                read = shown[0].token if shown else ""
                found.append(
                    Favourite(
                        layer=layer,
                        expert=expert,
                        token=token,
                        text=visible(whole.id_to_token(token)) if not read or BROKEN in read else read,
                        lift=float(lift_V[v]),
                        count=int(counts_V[v]),
                        chosen=int(chosen_V[v]),
                        contexts=shown,
                    )
                )
    return found


def _read_tokenizer(tokenizer: Path, trace: RoutingTrace) -> Any:
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not path.is_file():
        raise InputError("no tokenizer.json", where=str(tokenizer), needed="the tokenizer of the traced model")
    if sha256_file(path) != trace.provenance.get("tokenizer_sha256"):
        raise InputError("not the tokenizer of the traced text", where=str(path), hint="trace the model again")
    return read_tokenizer(path)


def _contexts(
    trace: RoutingTrace, places: npt.NDArray[np.int64], decode: Decode, *, contexts: int, around: int
) -> tuple[Context, ...]:
    """The first place of each domain, then the second of each, …, so that a few are as different as can be."""
    size = trace.sample_tokens_GS.shape[1]
    domains = places // size
    turn = np.arange(len(places)) - np.searchsorted(domains, domains)
    chosen = places[np.lexsort((domains, turn))][:contexts]
    return tuple(
        _context(trace.domains[place // size], trace.sample_tokens_GS[place // size], place % size, decode, around)
        for place in chosen.tolist()
    )


def _context(domain: str, tokens_S: Array, place: int, decode: Decode, around: int) -> Context:
    """The words of a token's own piece. Each part is what its tokens add to the text before: how a token reads, its
    space above all, depends on what stands in front of it."""
    ends = np.flatnonzero(tokens_S < 0)
    first = int(np.searchsorted(ends, place))
    begin = max(0 if first == 0 else int(ends[first - 1]) + 1, place - around)
    end = min(int(ends[first]) if first < len(ends) else len(tokens_S), place + around + 1)
    ids = tokens_S[begin:end].tolist()
    read = [decode(ids[:stop]) for stop in (place - begin, place - begin + 1, len(ids))]
    before, token = (_shared(read[index], read[index + 1]) for index in range(2))
    return Context(domain, visible(read[2][:before]), visible(read[2][before:token]), visible(read[2][token:]))


def _shared(first: str, second: str) -> int:
    """How many characters two texts have in common from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def visible(text: str) -> str:
    r"""`text` with everything that is not printable (line ends, escapes, marks that turn the direction) spelled out."""
    return "".join(character if character.isprintable() else _spelled(character) for character in text)


def _spelled(character: str) -> str:
    return {"\n": "⏎", "\t": "⇥"}.get(character) or character.encode("unicode_escape").decode()
