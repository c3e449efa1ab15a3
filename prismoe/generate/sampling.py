"""How tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from prismoe.errors import UsageError

__all__ = ["Sampling"]


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 takes the likeliest token, else one is drawn, from the likeliest ones that hold `top_p` of the
    probability together. The same `seed` draws the same for every prompt: what differs is the prompt.

    Raises:
        UsageError: out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise UsageError(
                f"max_new_tokens {self.max_new_tokens}, temperature {self.temperature}",
                needed="at least 1 and at least 0",
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p}", needed="above 0 and at most 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed {self.seed}", needed="0 or more")
