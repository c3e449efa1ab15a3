"""Which text calibration reads: full windows of the train splits of prepared domains, drawn once, in a fixed order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prismoe.data.permutation import round_keys
from prismoe.data.shards import Domain
from prismoe.data.weights import resolve_weights
from prismoe.errors import InputError, UsageError

__all__ = ["Text", "draw_text"]

IdArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Text:
    """N sequences of `seq_len` ids. Sequence n is window `windows[n]` of domain `domain_ids[n]`.

    `samples` [S] are the tokens whose vectors are kept, as ascending n·seq_len + t.
    """

    domains: tuple[Domain, ...]
    domain_ids: IdArray
    windows: IdArray
    samples: IdArray
    seq_len: int
    start_token: bool

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def num_tokens(self) -> int:
        return len(self) * self.seq_len

    def ids(self, first: int, stop: int) -> IdArray:
        """[stop - first, seq_len] ids of neighbouring sequences."""
        own = self.seq_len - self.start_token
        ids = np.empty((stop - first, self.seq_len), np.int64)
        tokens = [domain.tokens("train") for domain in self.domains]
        for row, (g, window) in enumerate(zip(self.domain_ids[first:stop], self.windows[first:stop], strict=True)):
            ids[row, self.seq_len - own :] = tokens[g][window * own : (window + 1) * own]
            if self.start_token:
                ids[row, 0] = self.domains[g].start_token
        return ids


def draw_text(
    domains: Sequence[Domain],
    *,
    weights: Mapping[str, float] | str,
    seq_len: int,
    max_tokens: int,
    sample_tokens: int,
    start_token: bool,
    seed: int,
) -> Text:
    """Draw max_tokens / seq_len windows without replacement, and the tokens to sample from them.

    A domain gives its share by `weights` or, when it is shorter than that, all it has. With `start_token` each window
    is that id and seq_len - 1 ids of text.

    Raises:
        UsageError: no domain, too few tokens for a sequence of each domain, or no start token to open windows with.
        InputError: a domain shorter than one sequence.
    """
    domains = tuple(sorted(domains, key=lambda domain: domain.name))
    names = [domain.name for domain in domains]
    if not domains or len(set(names)) < len(names):
        raise UsageError(f"domains {', '.join(names) or 'none'}", where="domains", needed="one or more, named apart")
    wanted = max_tokens // seq_len
    shares = np.array(list(resolve_weights(weights, domains).values())) * wanted
    quotas = np.floor(shares + 1e-9).astype(np.int64)
    quotas[np.argsort(quotas - shares, kind="stable")[: wanted - quotas.sum()]] += 1
    drawn = []
    for g, (domain, quota) in enumerate(zip(domains, quotas.tolist(), strict=True)):
        where = f"domain {domain.name}"
        if start_token and domain.start_token is None:
            raise UsageError("its tokenizer has no start token", where=where, hint="set start_token=false")
        if not quota:
            raise UsageError(
                f"no sequence of {seq_len} among {max_tokens} tokens",
                where=where,
                hint="read more tokens, give it more weight, or leave the domain out",
            )
        available = domain.num_tokens // (seq_len - start_token)
        if not available:
            raise InputError(
                f"{domain.num_tokens} tokens of training text, less than one sequence of {seq_len}",
                where=where,
                hint="give it more text or a shorter seq_len",
            )
        generator = _generator(seed, f"windows {domain.name}")
        windows = np.sort(generator.choice(available, min(quota, available), replace=False, shuffle=False))
        drawn.append(np.stack([np.full(len(windows), g), windows]))
    order = np.concatenate(drawn, axis=1)
    order = order[:, _generator(seed, "order").permutation(order.shape[1])]
    num_tokens = order.shape[1] * seq_len
    kept = _generator(seed, "samples").choice(num_tokens, min(sample_tokens, num_tokens), replace=False, shuffle=False)
    return Text(
        domains=domains,
        domain_ids=order[0],
        windows=order[1],
        samples=np.sort(kept),
        seq_len=seq_len,
        start_token=start_token,
    )


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """A stream of its own for each purpose, so that changing how one is used leaves the others."""
    return np.random.Generator(np.random.Philox(key=round_keys("calibrate", seed, purpose)[:2]))
