"""What a training run is made of. No torch here: a config file is checked without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from prismoe.errors import UsageError
from prismoe.typed import check_types

__all__ = ["LATER", "MAY_CHANGE", "PretrainConfig"]

MAY_CHANGE = (
    *("save_every", "keep", "max_epochs", "threads", "timeout"),
    *("device", "replicate", "expert_parallel", "micro_batch_size", "recompute"),
    *("max_steps", "processes", "hardware", "keep_memory"),
)
"""Settings that may be others when a run goes on: when its state is saved, where and in what parts it is computed.

The parts in which a mixture is computed are bound by its balance losses: see `PretrainConfig`.
"""

_TAUGHT = ("text_weight", "teacher_weight", "teacher_temperature", "teacher_top")

LATER = ("compile", "teacher", *_TAUGHT)
"""Settings that a later version added: with their defaults, finished runs of the versions before are what they were."""

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of `pretrain`. Defaults are LLaMA-MoE's (arXiv 2406.16554, appendix) where it states them.

    `model` says what a run trains: the mixture that `convert` wrote, the same one made in memory ("online": nothing is
    converted), or the dense source itself.
    A batch is `batch_size` sequences of `seq_len` tokens, computed `micro_batch_size` sequences at a time (0: all
    at once). `init` "random" draws the weights anew from the config of the source instead of reading them.
    `tokens` is a budget instead of `steps`, rounded up to whole ones. `max_steps` stops after that many steps of this
    command, saved and to be continued; `patience` ends a run when so many evaluations in a row have not lowered the
    mean held-out loss (0: neither). `recompute` computes activations a second time instead of keeping them;
    `compile` has torch compile the layers, all but their mixtures (see `train.compiling`).
    Learning rate: linear warm-up over `warmup_steps`, half-cosine to `min_lr_ratio` · `lr`. Weight decay spares
    norms and biases. `clip` is the largest global gradient norm. `precision` "bf16" computes matrix products in
    bfloat16 (autocast) over float32 weights. `fast_matmul` lets float32 products take another kernel (on some AMD CPUs
    twice as fast; of lower precision on others): it is tried once against float64 and refused when off by > 1e-5.
    `keep_memory` lets the process keep memory that it frees (glibc only; on a CPU a quarter to a half less time for
    layers of some size). `prismoe doctor` tries both. `experts` says by what function those of a mixture compute:
    "auto" follows from device and sizes (`train.experts`), "fastest" from a trial at the begin (`train.fastest`).
    `router` is the policy for a mixture's routers (ignored by a dense model) and `arguments` are its own; of several
    policies, which work in their order, `arguments` has a mapping for each that needs one. `unfold_scale` takes the
    scale of the plan out of down_proj while training, if that is exact (auto), or refuses to train otherwise (true).
    `mixing` is the rule that moves the domain weights (`prismoe.data.rules`) and `mixing_arguments` are its own; a
    dynamic one looks at the held-out losses every `mixing_every_tokens` and compares them with `reference`, a file
    of `reference_loss` or a loss for each domain. `attend` "document" keeps attention within documents.
    `teacher` distils from a frozen checkpoint of the same vocabulary: a folder, or "source", the dense one of the run.
    The loss is then `text_weight` · text + `teacher_weight` · T² · divergence, where T is `teacher_temperature` and
    `teacher_top` (0: all) is how many of the teacher's likeliest words are compared one by one: see `train.lesson`.
    With a `teacher_weight` of 0 there is none.
    `eval_every` and `save_every` count steps (0: only at the ends); `eval_tokens` bounds the held-out tokens read
    per domain; `keep` is how many training checkpoints stay (see `train.saving`). A run that would
    read a domain more than `max_epochs` times is refused. `threads` 0 leaves the number to torch.
    A step whose loss or gradient is not finite, or whose gradient norm is over `spike` times the usual one (0: any is
    fine), is left out; after `skip_limit` of them in a row the run goes back to its last checkpoint and on with other
    text, `rollbacks` times at most.
    Under torchrun the training state is sharded over all processes, in `replicate` copies; `expert_parallel` processes
    share out whole experts. `batch_size` is that of all processes together, `micro_batch_size` that of one. Balance
    losses are ratios of sums over the sequences that all processes compute at once: of a mixture `micro_batch_size` ·
    processes has to stay when a run goes on (0 always does). A process that stays in one phase for `timeout` seconds
    ends the run. A dry run speaks of `processes` (0: those that were launched) on `hardware`, a name of `train.speed`.
    """

    model: Literal["moe", "online", "dense"] = "moe"
    steps: Count = 1000
    tokens: Count = 0
    max_steps: Count = 0
    patience: Count = 0
    seq_len: Annotated[int, Field(ge=2)] = 512
    batch_size: Positive = 16
    micro_batch_size: Count = 0
    init: Literal["source", "random"] = "source"
    lr: Annotated[float, Field(gt=0)] = 2e-4
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup_steps: Count = 100
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] = 1.0
    recompute: bool = False
    compile: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    fast_matmul: bool = False
    keep_memory: bool = False
    experts: Literal["auto", "fastest", "sorted", "grouped_mm", "eager"] = "auto"
    router: str | tuple[str, ...] = "switch"
    arguments: dict[str, Any] = field(default_factory=dict)
    unfold_scale: Literal["auto"] | bool = "auto"
    mixing: str = "static"
    mixing_arguments: dict[str, str | float] | None = None
    mixing_every_tokens: Positive = 2_500_000_000
    reference: str | dict[str, float] | None = None
    attend: Literal["sequence", "document"] = "sequence"
    teacher: str = ""
    teacher_weight: Annotated[float, Field(ge=0)] = 1.0
    text_weight: Annotated[float, Field(ge=0)] = 1.0
    teacher_temperature: Annotated[float, Field(gt=0)] = 1.0
    teacher_top: Count = 0
    eval_every: Count = 0
    eval_tokens: Annotated[int, Field(ge=2)] = 65_536
    save_every: Count = 0
    keep: Positive = 1
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    max_epochs: Annotated[float, Field(gt=0)] = 4.0
    threads: Count = 0
    spike: Annotated[float, Field(ge=0)] = 50.0
    skip_limit: Positive = 3
    rollbacks: Count = 2
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicate: Positive = 1
    expert_parallel: Positive = 1
    timeout: Annotated[float, Field(gt=0)] = 600.0
    processes: Count = 0
    hardware: str = ""

    def __post_init__(self) -> None:
        check_types(self, section="pretrain")
        if self.tokens:
            steps = -(-self.tokens // (self.batch_size * self.seq_len))
            if self.steps not in (type(self).steps, steps):
                raise UsageError(f"{self.tokens} tokens and {self.steps} steps", where="pretrain.tokens", needed="one")
            object.__setattr__(self, "steps", steps)
        if not self.steps:
            raise UsageError("0: no steps", where="pretrain.steps", needed="1 or more, or pretrain.tokens")
        if self.warmup_steps >= self.steps:
            raise UsageError(
                f"{self.warmup_steps} warm-up steps of {self.steps} steps",
                where="pretrain.warmup_steps",
                needed="fewer than steps",
                hint="with so few steps, warmup_steps=0 or a tenth of them",
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise UsageError(
                f"{self.micro_batch_size} does not divide batch_size {self.batch_size}",
                where="pretrain.micro_batch_size",
                needed="a divisor of batch_size, or 0 for the whole batch",
            )
        self._check_taught()

    def _check_taught(self) -> None:
        changed = [name for name in _TAUGHT if getattr(self, name) != getattr(type(self), name)]
        if changed and not self.teacher:
            where, needed = f"pretrain.{changed[0]}", "pretrain.teacher: source or a folder"
            raise UsageError(f"{getattr(self, changed[0])} without a teacher", where=where, needed=needed)
        if not self.text_weight and not self.teacher_weight:
            raise UsageError(
                "0, and teacher_weight 0 too: nothing to learn",
                where="pretrain.text_weight",
                needed="one of them above 0",
                hint="text_weight=1 learns from the text, teacher_weight=1 from the teacher",
            )
