"""What a calibration is made of. No torch here: a config file is checked without it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from prismoe import registry
from prismoe.errors import UsageError
from prismoe.stats import QUANTITIES
from prismoe.typed import check_types

__all__ = ["CalibrateConfig"]

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class CalibrateConfig:
    """Settings of `calibrate`. `quantities` are keys of `prismoe.stats.QUANTITIES`.

    `clusters`: data clusters that importance is kept apart for. A number makes them by k-means over mean hidden states
    of the model, or over sentence embeddings when `encoder` names a folder with a stock encoder and its tokenizer;
    1 is all text together; "domains" takes each domain as one (so clusters made elsewhere can be prepared as domains).
    `importance`, per cluster over tokens t: "l1" is Σ|h·∂ℒ/∂h| (LLaMA-MoE's choice: sample level), "square" is
    Σ(h·∂ℒ/∂h)²; "total" is |Σ h·∂ℒ/∂h| and "total_square" its square. All are divided by the number of tokens.
    `marks_per_token` is K_a, how many of its largest |h| a token marks. `sample_tokens` tokens keep their vectors.
    Text: about `max_tokens` tokens, from the domains by `weights` (a preset or fractions), in windows of `seq_len`
    (0: the model's positions, at most 2048), each opened with the start token if `start_token`.
    `layers_at_once` is how many layers are in memory (0: all); hidden states then wait on disk in between.
    Work is saved every `save_seconds` (0: after every batch), so that a stopped run loses no more.
    """

    quantities: tuple[str, ...] = ("activation", "importance", "marks", "inputs", "output")
    clusters: Positive | Literal["domains"] = 1
    encoder: str | None = None
    importance: Literal["l1", "square", "total", "total_square"] = "l1"
    marks_per_token: Positive = 10
    sample_tokens: Positive = 4096
    max_tokens: Positive = 131_072
    seq_len: Count = 0
    batch_size: Positive = 8
    weights: str | dict[str, Annotated[float, Field(ge=0)]] = "uniform"
    start_token: bool = False
    layers_at_once: Count = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")] = "auto"
    threads: Count = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    save_seconds: Annotated[float, Field(ge=0)] = 30.0

    def __post_init__(self) -> None:
        check_types(self, section="calibrate")
        for name in self.quantities:
            if name not in QUANTITIES:
                hint = registry.suggestion(name, QUANTITIES)
                raise UsageError(f"unknown quantity {name!r}", where="calibrate.quantities", hint=hint)
        if self.encoder is not None and not self.by_text:
            needed = "a number above 1"
            raise UsageError(f"{self.clusters!r} with an encoder", where="calibrate.clusters", needed=needed)
        if not self.quantities:
            needed = "some of " + ", ".join(QUANTITIES)
            raise UsageError("no quantities", where="calibrate.quantities", needed=needed)

    @property
    def by_text(self) -> bool:
        """Whether data clusters are to be found in the text."""
        return isinstance(self.clusters, int) and self.clusters > 1

    @property
    def gradient(self) -> bool:
        """Whether a backward pass is needed."""
        return "importance" in self.quantities or "scores" in self.quantities

    @property
    def activations(self) -> bool:
        """Whether the activations themselves are looked at, beyond their product with the gradient."""
        return not {"activation", "marks", "coactivation"}.isdisjoint(self.quantities)

    @property
    def num_marks(self) -> int:
        """Marks a token; 0 where nobody asked for marks."""
        return 0 if {"marks", "coactivation"}.isdisjoint(self.quantities) else self.marks_per_token
