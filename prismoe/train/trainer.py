"""One update of the weights from the batch of one step, over all micro-batches and processes."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from prismoe.data.mixture import Batch, Mixture
from prismoe.train.alarms import ExpertAlarms
from prismoe.train.device import seed_draws
from prismoe.train.engine import Engine
from prismoe.train.head import text_loss
from prismoe.train.health import Health
from prismoe.train.routers import Moment, Policy, Router
from prismoe.train.routing import GradientGuard, LoadMeter
from prismoe.train.schedule import learning_rate
from prismoe.train.settings import PretrainConfig
from prismoe.train.teacher import Teacher
from prismoe.train.updates import norms, scale_gradients

__all__ = ["Trainer"]


@dataclass
class Trainer:
    """A model and what changes it. A step is the same whatever the number of processes, up to the order of sums.

    Process r of W takes part m·W + r of the batch as its micro-batch m, so that micro-batch m of all of them together
    is one run of rows.
    """

    model: Any
    config: PretrainConfig
    mixture: Mixture
    routers: list[Router]
    policy: Policy
    optimizer: torch.optim.Optimizer
    engine: Engine
    health: Health
    teacher: Teacher | None = None
    parameters: list[torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        # What a policy trains is whole in every process: its gradient has to be added up here.
        self._replicated = list(self.policy.parameters().values())
        self.parameters = [*self.model.parameters(), *self._replicated]
        self._router_parameters = [list(router.module.parameters()) for router in self.routers]
        self.guard = GradientGuard(self.routers, patience=min(3, self.config.steps))
        self.alarms = ExpertAlarms([(router.num_experts, router.top_k) for router in self.routers])

    def autocast(self) -> AbstractContextManager[Any]:
        """bfloat16 products on a CPU; on a device the gathered weights already are (see `engine.placement`)."""
        on = self.config.precision == "bf16" and self.engine.device.type == "cpu"
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()

    def step(self, step: int) -> dict[str, Any]:
        """The update that follows `step` finished ones; returns its line for the log.

        The line is of the event "skipped" when the step was left out (see `Health`).

        Raises:
            NumericalError: a router has had no gradient for too long.
        """
        config, engine = self.config, self.engine
        engine.at("reading the batch", step + 1)
        seed_draws(_step_seed(config.seed, step), engine.device)
        rate = learning_rate(
            step, steps=config.steps, peak=config.lr, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batches = self._batches(step + self.health.passed_over)
        meter = LoadMeter(self.routers, total=engine.sum)
        sums, beside = self._forward_backward(batches, step, meter)
        engine.at("adding up gradients")
        for parameter in self._replicated:
            if parameter.grad is not None:
                engine.sum(parameter.grad)
        self.policy.before_step(self.model.parameters())
        squares = norms([self.parameters, *self._router_parameters], engine)
        together = engine.sum(torch.cat([squares, sums, beside])).cpu()
        parts = [len(squares), *[len(self.mixture.names)] * 2, len(beside)]
        squares, nats, tokens, beside = torch.split(together, parts)
        whole, *router_norms = squares.sqrt().tolist()
        loss = float(nats.sum() / tokens.sum())
        if found := self.health.judge(loss=loss + float(beside.sum()), norm=whole):
            self.optimizer.zero_grad(set_to_none=True)
            return {"event": "skipped", "step": step + 1, "lr": rate, "found": found, "tokens": int(tokens.sum())}
        self.guard.check(router_norms, whole=whole, step=step + 1)
        if whole > config.clip:
            scale_gradients(self.parameters, config.clip / whole)
        engine.at("changing the weights")
        self.optimizer.step()
        self.policy.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        by_domain = {
            name: float(nats[g] / tokens[g]) for g, name in enumerate(self.mixture.names) if float(tokens[g]) > 0
        }
        line = {
            "event": "step",
            "step": step + 1,
            "lr": rate,
            "loss": loss,
            "tokens": int(tokens.sum()),
            "by_domain": by_domain,
        }
        if self.teacher is not None:
            line["teacher_loss"] = float(beside[1])
        if self.routers:
            line |= {"router_loss": float(beside[0]), **meter.summary(), **self.policy.metrics()}
            self.alarms.add(meter.counts())
        line["gradient_norm"] = whole
        if self.routers:
            line["router_gradient_norm"] = math.hypot(*router_norms)
        return line

    def _batches(self, data_step: int) -> list[tuple[int, Batch]]:
        """The micro-batches of this process, each with the number of its first row in the global batch."""
        world, rank = self.engine.world, self.engine.rank
        rows = self.config.batch_size // world
        parts = rows // (self.config.micro_batch_size or rows)
        numbers = [part * world + rank for part in range(parts)]
        size = self.config.batch_size // (parts * world)
        return [(number * size, self.mixture.batch(data_step, rank=number, world=parts * world)) for number in numbers]

    def _forward_backward(
        self, batches: list[tuple[int, Batch]], step: int, meter: LoadMeter
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of this process. Returns nats and tokens by domain [2G], and of the losses beside that of the text
        its share: of the routers and, with a teacher, of the divergence from it a token."""
        config, engine, device = self.config, self.engine, self.engine.device
        scored = [torch.from_numpy((batch.labels[:, 1:] != -100).sum(axis=1)).double() for _, batch in batches]
        num_tokens = float(engine.sum(torch.cat(scored).sum()))
        nats, tokens = (torch.zeros(len(self.mixture.names), dtype=torch.float64, device=device) for _ in range(2))
        beside = torch.zeros(1 if self.teacher is None else 2, dtype=torch.float64, device=device)
        for (first_row, batch), scored_B in zip(batches, scored, strict=True):
            inputs_BT, labels_BT = (torch.from_numpy(part).to(device) for part in (batch.input_ids, batch.labels))
            positions_BT = None if batch.position_ids is None else torch.from_numpy(batch.position_ids).to(device)
            numbers_T = torch.arange(inputs_BT.numel(), device=device) + first_row * config.seq_len
            lesson = None
            if self.teacher is not None:
                engine.at("forward of the teacher")
                with self.autocast():
                    lesson = self.teacher.lesson(inputs_BT, position_ids=positions_BT)
            self.policy.begin(Moment(config.seed, step, numbers_T, config.seq_len))
            engine.at("forward")
            with self.autocast():
                loss, loss_BT = text_loss(
                    self.model, inputs_BT, labels_BT, num_tokens=num_tokens, lesson=lesson, position_ids=positions_BT
                )
            if lesson is not None:
                beside[1] += lesson.total() / num_tokens
            if self.routers:
                router_loss = self.policy.loss() * (float(scored_B.sum()) / num_tokens)
                meter.add()
                loss = loss + router_loss
                beside[0] += router_loss.detach()
            engine.at("backward")
            loss.backward()  # type: ignore[no-untyped-call]
            index_B = torch.from_numpy(batch.domain_ids).to(device)
            nats.index_add_(0, index_B, loss_BT.double().sum(dim=1))
            tokens.index_add_(0, index_B, scored_B.to(device))
        return torch.cat([nats, tokens]), beside


def _step_seed(seed: int, step: int) -> int:
    """Whatever a step draws depends on (seed, step) alone: there is no generator state to save."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63
