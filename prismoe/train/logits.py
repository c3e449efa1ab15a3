"""How many logits are computed at a time. A rule and no setting: a run that goes on has to compute the same bits."""

from __future__ import annotations

__all__ = ["logit_bytes", "rows_at_once"]

LARGEST = 1 << 25  # logits of a micro-batch up to here are computed whole: 128 MB in float32, and twice that again
ROWS = 512  # of more, those of so many tokens: fewer make the sums over the output matrix slow (measured)


def rows_at_once(tokens: int, vocab_size: int) -> int:
    """Of `tokens` tokens, for how many the logits over `vocab_size` words are computed together; 0 for all of them."""
    return ROWS if tokens * vocab_size > LARGEST and tokens > ROWS else 0


def logit_bytes(tokens: int, vocab_size: int, *, taught: bool = False) -> int:
    """What the loss of a micro-batch takes beside hidden states: logits, the same in float32, and their gradient.

    With a teacher as much again: its logits, and the logarithms of both models' probabilities.
    """
    return (24 if taught else 12) * vocab_size * (rows_at_once(tokens, vocab_size) or tokens)
