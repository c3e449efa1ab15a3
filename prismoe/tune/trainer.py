"""TRL's SFTTrainer with router policies, our log and our training state around it; the loop and the loss are TRL's.

Replaced is what a mixture, or the promise of no pickle, needs otherwise: the policy's balance loss is added to TRL's
loss (the stock class's own is off: twice would be wrong), gradients are seen before they are clipped, and training
state is written by `train.checkpoints` (safetensors and JSON) where the Trainer would use `torch.save` and
`torch.load`. Every draw of a step depends on (seed, step), so that there is no generator state to keep.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from prismoe.errors import NumericalError
from prismoe.folder import write_atomic
from prismoe.progress import Progress
from prismoe.train import checkpoints
from prismoe.train.device import seed_draws
from prismoe.train.engine import Engine
from prismoe.train.metrics import MetricsLog
from prismoe.train.routers import Moment, Policy, Router
from prismoe.train.routing import GradientGuard, LoadMeter
from prismoe.train.stopping import StopRequest
from prismoe.tune.rows import Rows
from prismoe.tune.settings import TuneConfig
from prismoe.tune.watch import Role, Roles, check_run

__all__ = ["Seen", "Tuner", "Work", "make_trainer", "read_state"]

_TRAINER_STATE = "trainer_state.json"


@dataclass
class Seen:
    """What is known of the run so far; JSON, and part of the training state.

    Attributes:
        table: roles with gradient norms after the first step.
        load_LE: how often each expert was chosen, layer by layer.
        tokens: ids read, and `supervised` of them predicted.
    """

    table: list[dict[str, Any]] = field(default_factory=list)
    load_LE: list[list[int]] = field(default_factory=list)
    tokens: int = 0
    supervised: int = 0


@dataclass(eq=False)
class Work:
    """What the trainer works with beside the model."""

    config: TuneConfig
    out: Path
    engine: Engine
    routers: list[Router]
    policy: Policy
    roles: Roles
    autocast: Callable[[], AbstractContextManager[Any]]
    trained_roles: list[str]
    balances: bool
    log: MetricsLog
    stop: StopRequest
    on_progress: Progress
    seen: Seen


class Tuner(SFTTrainer):  # type: ignore[misc]
    """See the module. Made by `make_trainer`."""

    def __init__(self, model: Any, work: Work, **options: Any) -> None:
        super().__init__(model=model, **options)
        self.work = work
        self.guard = GradientGuard(work.routers, patience=3)
        self.resumed_from = 0
        self.latest_loss = math.nan
        self._step = -1  # the one that the sums below are of

    # One micro-batch

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's mean loss a supervised token, and the policy's loss times this micro-batch's share of those tokens."""
        work, step = self.work, int(self.state.global_step)
        assert num_items_in_batch is not None, "a loss over all micro-batches of a step"
        if step != self._step:
            self._begin(step)
        ids, labels = inputs["input_ids"], inputs["labels"]
        numbers_T = torch.arange(ids.numel(), device=ids.device) + self._offset
        self._offset += ids.numel()
        work.policy.begin(Moment(work.config.seed, step, numbers_T, ids.shape[-1]))
        with work.autocast():
            loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        scored = (labels[..., 1:] != -100).sum()
        self._nats += loss.detach().double() * float(num_items_in_batch)
        self._scored += scored
        if work.routers:
            check_run(work.routers)
            router_loss = work.policy.loss() * (scored / num_items_in_batch)
            self._router_loss += router_loss.detach()
            self._meter.add()
            loss = loss + router_loss
        return loss

    def _begin(self, step: int) -> None:
        device = self.args.device
        self._step, self._offset = step, 0
        self._nats = torch.zeros((), dtype=torch.float64, device=device)
        self._scored = torch.zeros((), dtype=torch.int64, device=device)
        self._router_loss = torch.zeros((), device=device)
        self._meter = LoadMeter(self.work.routers)

    # One step

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """All gradients of the step are there: look at them, let the policy drop some, and clip.

        Raises:
            NumericalError: a gradient that is not finite, or a role that has none.
        """
        work, step = self.work, int(self.state.global_step) + 1
        own = list(work.policy.parameters().values())
        if not work.seen.table:
            table = work.roles.table()
            self._check(table, step)
            work.roles.check_gradients(work.trained_roles, step=step)
            work.seen.table = [vars(row) for row in table]
        router_norms = self.guard.norms()
        work.policy.before_step(model.parameters())
        parameters = [p for p in (*model.parameters(), *own) if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        whole, loss = float(norm), float(self._nats / self._scored)
        if not math.isfinite(whole) or not math.isfinite(loss):
            raise NumericalError(
                f"loss is {loss:.3g}, gradient norm {whole:.3g}",
                where=f"step {step}",
                needed="finite numbers",
                hint="no weight was changed by this step; lower lr",
            )
        self.guard.check(router_norms, whole=math.hypot(whole, *router_norms), step=step)
        torch.nn.utils.clip_grads_with_norm_(parameters, work.config.clip, norm)
        line = {
            "event": "step",
            "step": step,
            "lr": float(self.lr_scheduler.get_last_lr()[0]),
            "loss": loss,
            "tokens": self._offset,
            "supervised": int(self._scored),
            "gradient_norm": whole,
        }
        if work.routers:
            line |= {"router_loss": float(self._router_loss), **self._meter.summary(), **work.policy.metrics()}
            line["router_gradient_norm"] = math.hypot(*router_norms)
        self._line, self.latest_loss = line, loss
        return norm

    def _check(self, table: list[Role], step: int) -> None:
        """What was asked for is at work: a policy that balances has said so in the first step."""
        if self.work.balances and float(self._router_loss) == 0:
            raise NumericalError(
                "the router policy's loss is 0 although it was asked for",
                where=f"step {step}",
                needed="a balance loss that is on",
                hint="are the model's routers those that run?",
            )

    def finished_step(self) -> None:
        """After the optimizer: the policy's turn, the log and the sums of the run."""
        work = self.work
        work.policy.after_step()
        for parameter in work.policy.parameters().values():
            parameter.grad = None
        counts = self._meter.counts()
        before = work.seen.load_LE or [[0] * len(layer) for layer in counts]
        work.seen.load_LE = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, counts, strict=True)]
        work.seen.tokens += self._offset
        work.seen.supervised += int(self._scored)
        work.log.write(self._line)

    # Training state

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        work = self.work
        work.log.sync()
        scheduler = self.lr_scheduler.state_dict()
        state = {
            "step": int(self.state.global_step),
            "log": work.log.position,
            "seen": vars(work.seen),
            "scheduler": {key: value for key, value in scheduler.items() if key != "lr_lambdas"},
        }
        folder = work.out / "checkpoints"
        tensors = checkpoints.tensors_of(_Trained(self.model), work.policy, self._adamw)
        checkpoints.require_room(folder, tensors, work.engine)
        checkpoints.save(folder, step=int(self.state.global_step), engine=work.engine, tensors=tensors, state=state)
        checkpoints.prune(folder, keep=work.config.keep)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights come with the rest, below."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        work = self.work
        state = checkpoints.restore(
            Path(checkpoint), engine=work.engine, model=_Trained(self.model), policy=work.policy, optimizer=self._adamw
        )
        self.lr_scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(self._adamw.param_groups)})
        for group, rate in zip(self._adamw.param_groups, state["scheduler"]["_last_lr"], strict=True):
            group["lr"] = rate

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        optimizer: Any = self.optimizer
        found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        return found

    def run(self) -> None:
        """All steps that are left, from the newest checkpoint on."""
        found = checkpoints.latest(self.work.out / "checkpoints", self.work.engine)
        if found is not None:
            state = read_state(found)
            self.resumed_from = int(state["step"])
            known = {"global_step": self.resumed_from, "train_batch_size": self.args.train_batch_size}
            write_atomic(found / _TRAINER_STATE, json.dumps(known).encode())
        with quiet_libraries():
            self.train(resume_from_checkpoint=None if found is None else str(found))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What a training checkpoint says beside its tensors."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_bytes())
    return state


class _Between(TrainerCallback):  # type: ignore[misc]
    """What is done between two steps."""

    def __init__(self, tuner: Tuner) -> None:
        self.tuner = tuner

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        work = self.tuner.work
        seed_draws((work.config.seed * 0x9E3779B97F4A7C15 + state.global_step) % 2**63, work.engine.device)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.tuner.finished_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        work, step = self.tuner.work, state.global_step
        work.on_progress(f"tune step: loss {self.tuner.latest_loss:.3f}", step, state.max_steps)
        enough = bool(work.config.max_steps) and step - self.tuner.resumed_from >= work.config.max_steps
        stopping = bool(work.stop.signal_name) or enough
        due = bool(work.config.save_every) and step % work.config.save_every == 0 and step < state.max_steps
        control.should_save = stopping or due
        control.should_training_stop = control.should_training_stop or stopping


class _Trained(torch.nn.Module):
    """The parameters of a model that train, and nothing else of it: what a training checkpoint holds."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        yield from self.trained


def make_trainer(model: Any, work: Work, rows: Rows, tokenizer: Any) -> Tuner:
    """SFTTrainer on `rows`, ready to `run`."""
    config = work.config
    with quiet_libraries():
        arguments = SFTConfig(
            output_dir=str(work.out / "checkpoints"),
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.batch_size // config.micro_batch_size,
            num_train_epochs=config.epochs,
            learning_rate=config.lr,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(config.warmup_ratio * rows.steps),
            weight_decay=config.weight_decay,
            max_grad_norm=config.clip,
            bf16=False,  # autocast is ours: the same around training and held-out losses
            use_cpu=work.engine.device.type == "cpu",
            activation_checkpointing=False,  # `recompute` was put on the model
            router_aux_loss_coef=0.0,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
            seed=config.seed % 2**32,  # NumPy's limit
            data_seed=config.seed % 2**32,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        tuner = Tuner(
            model,
            work,
            args=arguments,
            train_dataset=rows.dataset,
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
            optimizers=(_adamw(model, work), None),
        )
        tuner.remove_callback(PrinterCallback)
        tuner.add_callback(_Between(tuner))
    return tuner


def _adamw(model: torch.nn.Module, work: Work) -> torch.optim.AdamW:
    """The Trainer's AdamW, for what the policy trains too; vectors do not decay."""
    trained = [p for p in (*model.parameters(), *work.policy.parameters().values()) if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": work.config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=work.config.lr, fused=True)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Modules never print: what the Trainer would tell is in our log."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
