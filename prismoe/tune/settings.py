"""What instruction tuning is made of. No torch here: a config file is checked without it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.typed import check_types

__all__ = ["MAY_CHANGE", "TuneConfig"]

MAY_CHANGE = ("save_every", "keep", "threads", "device", "recompute", "max_steps")
"""Settings that may be others when a run goes on: they change no result."""

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Adapted = Literal["attention", "experts", "shared"]


@dataclass(frozen=True)
class TuneConfig:
    """Settings of `tune`. Defaults are LLaMA-MoE's (arXiv 2406.16554, section 5.10, and its published scripts).

    `data` are files or patterns of conversations in one of the forms of `tune.forms` (`form`), rendered by `template`
    (a name, a file, or "model" for the model's own) and cut off after `seq_len` ids; `max_refused` is the share of rows
    that may be no conversation.
    A batch is `batch_size` rows, computed `micro_batch_size` at a time; a row is a conversation, or with `packing` as
    many whole ones as fit into `seq_len` ids. Rows of a micro-batch are laid end to end and never padded; each
    conversation attends to itself alone.
    `lr` rises over `warmup_ratio` of the steps and falls along a half-cosine to 0. `clip` is the largest global
    gradient norm. `precision` "bf16" computes matrix products in bfloat16 over float32 weights. `recompute` computes
    activations a second time instead of keeping them. `experts` and `unfold_scale` are those of `pretrain`.
    `router` is the policy for a mixture's routers (noise, balance loss) and `arguments` are its own. `router_training`
    "freeze" leaves the routers as they are, "warmup:N" trains them alone for N steps.
    `lora_rank` above 0 trains adapters of that rank on `lora_targets` (experts: one for each expert and matrix) with
    factor `lora_alpha` / `lora_rank`, and the routers in full; what is written is the merged model.
    `heldout` is the share of conversations that is kept for the losses before and after. `save_every` counts steps (0:
    only when stopped), `keep` is how many training checkpoints stay. `max_steps` stops after that many steps of this
    command, saved and to be continued.
    """

    data: str | list[str]
    form: str = "auto"
    template: str = "model"
    max_refused: Share = 0.01
    seq_len: Annotated[int, Field(ge=2)] = 2048
    batch_size: Positive = 128
    micro_batch_size: Positive = 1
    packing: bool = False
    epochs: Positive = 2
    lr: Annotated[float, Field(gt=0)] = 2e-5
    warmup_ratio: Share = 0.03
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    recompute: bool = False
    experts: Literal["auto", "sorted", "grouped_mm", "eager"] = "auto"
    router: str | tuple[str, ...] = "noisy_topk"
    arguments: dict[str, Any] = field(default_factory=dict)
    router_training: str = "train"
    unfold_scale: Literal["auto"] | bool = "auto"
    lora_rank: Count = 0
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_targets: tuple[Adapted, ...] = ("attention", "experts", "shared")
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.02
    save_every: Count = 0
    keep: Positive = 1
    max_steps: Count = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    threads: Count = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_types(self, section="tune")
        if not re.fullmatch(r"train|freeze|warmup:[1-9]\d{0,8}", self.router_training):
            raise UsageError(
                repr(self.router_training), where="tune.router_training", needed="train, freeze or warmup:N"
            )
        if self.batch_size % self.micro_batch_size:
            raise UsageError(
                f"{self.micro_batch_size} does not divide batch_size {self.batch_size}",
                where="tune.micro_batch_size",
                needed="a divisor of batch_size",
            )
        if self.lora_rank and not self.lora_targets:
            raise UsageError("nothing to adapt", where="tune.lora_targets", needed="attention, experts or shared")

    @property
    def warmup_routers(self) -> int:
        """Steps in which the routers are trained alone."""
        return int(self.router_training.partition(":")[2] or 0)

    @property
    def policies(self) -> tuple[str, ...]:
        """The router policies at work: the chosen ones, and what `router_training` adds."""
        chosen = (self.router,) if isinstance(self.router, str) else tuple(self.router)
        extra = {"train": (), "freeze": ("frozen",), "warmup": ("warmup",)}[self.router_training.partition(":")[0]]
        return (*chosen, *(name for name in extra if name not in chosen))
