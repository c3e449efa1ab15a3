"""The training loop: batches are a function of the step, the loss is a mean over tokens, a checkpoint is exact."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from prismoe.data.mixture import Batch, Mixture
from prismoe.data.rules import Mixing
from prismoe.data.shards import heldout_windows
from prismoe.errors import InterruptedRun, NumericalError
from prismoe.progress import Progress
from prismoe.train import checkpoints
from prismoe.train.metrics import MetricsLog
from prismoe.train.routers import Moment, Policy, Router, attach_policy
from prismoe.train.routing import GradientGuard, LoadMeter, watch
from prismoe.train.schedule import learning_rate
from prismoe.train.scoring import score_text, token_losses
from prismoe.train.settings import PretrainConfig

__all__ = ["Finished", "StopRequest", "stop_on_signal", "train"]


@dataclass(frozen=True)
class Finished:
    """How a run of the loop went: what `pretrain` puts into its receipt."""

    resumed_from: int
    steps_run: int
    seconds: float
    num_routers: int


@dataclass
class StopRequest:
    """Set by a signal; the loop looks at it between steps and between windows of evaluation."""

    signal_name: str = ""


class _Stopped(Exception):
    """Evaluation was left early because a stop was requested."""


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGINT and SIGTERM become a request while the context is open; a second one acts as it did before."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread can have handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        request.signal_name = signal.Signals(number).name
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class _Run:
    model: Any
    config: PretrainConfig
    mixture: Mixture
    routers: list[Router]
    policy: Policy
    optimizer: torch.optim.Optimizer
    log: MetricsLog
    stop: StopRequest
    on_progress: Progress
    parameters: list[torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [*self.model.parameters(), *self.policy.parameters().values()]
        self.guard = GradientGuard(self.routers, patience=min(3, self.config.steps))

    def step(self, step: int) -> dict[str, Any]:
        """One update from the batch of `step`; returns its line for the log."""
        config = self.config
        torch.manual_seed(_step_seed(config.seed, step))
        rate = learning_rate(
            step, steps=config.steps, peak=config.lr, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.mixture.batch(step)
        meter = LoadMeter(self.routers)
        loss_BT, router_loss = self._forward_backward(batch, step, meter)
        line: dict[str, Any] = {
            "event": "step",
            "step": step + 1,
            "lr": rate,
            **_by_domain(batch, loss_BT, self.mixture.names),
        }
        if self.routers:
            line["router_loss"] = router_loss
            line |= {**meter.summary(), **self.policy.metrics()}
        self.policy.before_step(self.model.parameters())
        router_norms = self.guard.norms()
        whole = float(torch.nn.utils.clip_grad_norm_(self.parameters, config.clip))
        if not math.isfinite(whole):
            raise _not_finite(f"gradient norm is {whole}", step)
        self.guard.check(router_norms, whole=whole, step=step + 1)
        self.optimizer.step()
        self.policy.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        line["gradient_norm"] = whole
        if self.routers:
            line["router_gradient_norm"] = math.hypot(*router_norms)
        return line

    def _forward_backward(self, batch: Batch, step: int, meter: LoadMeter) -> tuple[torch.Tensor, float]:
        inputs_BT, labels_BT = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels)
        size = self.config.micro_batch_size or len(inputs_BT)
        num_tokens = int((labels_BT[:, 1:] != -100).sum())
        positions_BT = None if batch.position_ids is None else torch.from_numpy(batch.position_ids)
        parts, router_total = [], 0.0
        for start in range(0, len(inputs_BT), size):
            labels = labels_BT[start : start + size]
            numbers_T = torch.arange(start * inputs_BT.shape[1], (start + len(labels)) * inputs_BT.shape[1])
            self.policy.begin(Moment(self.config.seed, step, numbers_T, inputs_BT.numel()))
            with _autocast(self.config.precision):
                positions = None if positions_BT is None else positions_BT[start : start + size]
                inputs = inputs_BT[start : start + size]
                logits_BTV = self.model(input_ids=inputs, position_ids=positions, use_cache=False).logits
            loss_BT = token_losses(logits_BTV, labels)
            loss = loss_BT.sum() / num_tokens
            if self.routers:
                share = float((labels[:, 1:] != -100).sum()) / num_tokens
                router_loss = self.policy.loss() * share
                meter.add()
                loss = loss + router_loss
                router_total += float(router_loss.detach())
            if not torch.isfinite(loss):
                raise _not_finite(f"loss is {float(loss.detach())}", step)
            loss.backward()  # type: ignore[no-untyped-call]
            parts.append(loss_BT.detach())
        return torch.cat(parts), router_total

    def evaluate(self, step: int) -> dict[str, Any]:
        """Held-out loss a token of every domain, and the load of the routers over that text."""
        config = self.config
        meter = LoadMeter(self.routers)
        heldout: dict[str, Any] = {}

        def after_batch(done: int) -> None:
            meter.add()
            if self.stop.signal_name:
                raise _Stopped

        for domain in self.mixture.domains:
            name = domain.name
            self.on_progress(f"held-out loss: {name}", len(heldout), len(self.mixture.names))
            windows = heldout_windows(domain, seq_len=config.seq_len, max_tokens=config.eval_tokens)
            size = config.micro_batch_size or config.batch_size
            with _autocast(config.precision):
                found = score_text(
                    self.model, domain, windows, batch_size=size, where=f"held-out {name}", after_batch=after_batch
                )
            heldout[name] = {"loss": found.loss, "standard_error": found.standard_error, "tokens": windows.num_tokens}
        self.on_progress("held-out loss", len(heldout), len(heldout))
        return {"event": "eval", "step": step, "heldout": heldout, **meter.result()}


def train(
    model: Any,
    config: PretrainConfig,
    *,
    mixing: Mixing,
    out: Path,
    stop: StopRequest,
    on_progress: Progress,
) -> Finished:
    """Train `model` in place for `config.steps` steps, going on from the newest checkpoint under `out`.

    Batches come from the mixture of `mixing`, whose weights it moves where it is due.

    Writes `metrics.jsonl` and `checkpoints/` in `out`.

    Raises:
        InterruptedRun: `stop` was requested; the state is saved.
        NumericalError: a loss, gradient or router gradient that cannot be; no weight was changed by that step.
    """
    folder, mixture = out / "checkpoints", mixing.mixture
    log = None
    try:
        with watch(model) as routers:
            policy = attach_policy(config.router, routers, arguments=config.arguments)
            optimizer = _optimizer([*model.parameters(), *policy.parameters().values()], config)
            state: dict[str, Any] = {"step": 0, "log": 0, "evaluated": False}
            found = checkpoints.latest(folder)
            if found is not None:
                state = checkpoints.restore(found, model=model, policy=policy, optimizer=optimizer)
                mixture.restore(state["history"])
            first, evaluated = int(state["step"]), bool(state["evaluated"])
            log = MetricsLog(out / "metrics.jsonl", position=int(state["log"]))
            model.train()
            started = time.monotonic()
            run = _Run(model, config, mixture, routers, policy, optimizer, log, stop, on_progress)
            for step in range(first, config.steps + 1):
                due = step in (0, config.steps) or (config.eval_every and step % config.eval_every == 0)
                due = due or mixing.due(step)
                if due and not (evaluated and step == first):
                    try:
                        line = run.evaluate(step)
                        log.write(line)
                        moved = mixing.update(step, {n: e["loss"] for n, e in line["heldout"].items()})
                        if moved is not None:
                            log.write(moved)
                    except _Stopped:
                        due = False
                save = config.save_every and step % config.save_every == 0 and first < step < config.steps
                if (save or stop.signal_name) and step > 0:
                    log.sync()
                    state = {"step": step, "log": log.position, "evaluated": bool(due), "history": mixture.history}
                    checkpoints.save(folder, step=step, model=model, policy=policy, optimizer=optimizer, state=state)
                    checkpoints.prune(folder, keep=config.keep)
                if stop.signal_name:
                    raise InterruptedRun(
                        f"stopped by {stop.signal_name} after step {step} of {config.steps}",
                        where=str(out),
                        hint="the same command continues",
                    )
                if step < config.steps:
                    line = run.step(step)
                    log.write(line)
                    on_progress(f"train step: loss {line['loss']:.3f}", step + 1, config.steps)
            policy.detach()
            return Finished(first, config.steps - first, time.monotonic() - started, len(routers))
    finally:
        if log is not None:
            log.sync()
            log.close()


def _optimizer(parameters: list[torch.nn.Parameter], config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW; vectors (norm gains, biases) do not decay, matrices (embeddings and routers among them) do."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _autocast(precision: str) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def _step_seed(seed: int, step: int) -> int:
    """Whatever a step draws depends on (seed, step) alone: there is no generator state to save."""
    return (seed * 0x9E3779B97F4A7C15 + step) % 2**63


def _by_domain(batch: Batch, loss_BT: torch.Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    scored_B = torch.from_numpy((batch.labels[:, 1:] != -100).sum(axis=1)).double()
    loss_B = loss_BT.double().sum(dim=1)
    index_B = torch.from_numpy(batch.domain_ids).long()
    nats = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index_B, loss_B)
    tokens = torch.zeros(len(names), dtype=torch.float64).index_add_(0, index_B, scored_B)
    by_domain = {
        name: float(nats[index] / tokens[index]) for index, name in enumerate(names) if float(tokens[index]) > 0
    }
    return {"loss": float(nats.sum() / tokens.sum()), "tokens": int(tokens.sum()), "by_domain": by_domain}


def _not_finite(found: str, step: int) -> NumericalError:
    return NumericalError(
        found,
        where=f"step {step + 1}",
        needed="a finite number",
        hint="no weight was changed by this step; lower lr or clip",
    )
