"""What a recovery is made of. No torch here: a config file is checked without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.typed import check_types

__all__ = ["RecoverConfig"]

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class RecoverConfig:
    """Settings of `recover`. The defaults are those that did best in docs/recovery.md.

    `train` says what of a layer's mixture learns: its router alone, or its experts too, the shared one among them.
    `inputs` says what a layer's mixture gets to see: what the "dense" model's layers give, each layer by itself
    (LaDiMo), or what the "mixture" gives whose layers below have been recovered; then it learns the output that leads
    back to the dense model's stream (of a dense model that norms that output before it is added, what its FFN gives).
    Text: about `tokens` tokens of the train splits, in windows of `seq_len` (0: the model's positions, at most 2048);
    an eighth of them, at most 8192, is kept back to measure on. Each layer makes `epochs` passes over the rest in
    batches of `batch_tokens`, by AdamW with a peak of `lr` (None: 0.6 over the hidden size), warm-up over a twentieth
    of the steps, then half a cosine down to a tenth. `balance` is the coefficient of the Switch loss beside the
    relative squared error (0: none).
    `budget` is the mean number of experts that a token may be given in a layer, `error` the largest relative error
    that a layer may have: K follows from either (see `choose_top_k`); without them it stays.
    `batch_size` windows go through the dense model at a time.
    """

    train: Literal["router", "router+experts"] = "router+experts"
    inputs: Literal["mixture", "dense"] = "mixture"
    tokens: Positive = 100_000
    epochs: Positive = 4
    lr: Annotated[float, Field(gt=0)] | None = None
    batch_tokens: Positive = 256
    balance: Annotated[float, Field(ge=0)] = 0.01
    budget: Annotated[float, Field(ge=1)] | None = None
    error: Annotated[float, Field(gt=0)] | None = None
    seq_len: Count = 0
    batch_size: Positive = 8
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    threads: Count = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    def __post_init__(self) -> None:
        check_types(self, section="recover")
        if self.budget is not None and self.error is not None:
            raise UsageError("a budget and a largest error", where="recover.error", needed="one of them")
