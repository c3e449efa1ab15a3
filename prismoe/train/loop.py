"""The training loop: batches are a function of the step, the loss is a mean over tokens, a checkpoint is exact."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismoe.data.rules import Mixing
from prismoe.errors import InterruptedRun, PrismoeError, UsageError
from prismoe.plan import Plan
from prismoe.progress import Progress
from prismoe.train import checkpoints
from prismoe.train.alarms import in_short
from prismoe.train.allon import all_on
from prismoe.train.drift import ExpertDrift
from prismoe.train.engine import Engine
from prismoe.train.health import Health
from prismoe.train.heldout import LeftEarly, heldout_losses
from prismoe.train.metrics import MetricsLog
from prismoe.train.routers import attach_policy
from prismoe.train.routing import watch
from prismoe.train.saving import Saver
from prismoe.train.scalars import SCALARS, Scalars
from prismoe.train.settings import PretrainConfig
from prismoe.train.speed import TIMING, Timing, flops_per_token
from prismoe.train.stopping import StopRequest
from prismoe.train.teacher import Teacher
from prismoe.train.trainer import Trainer
from prismoe.train.unfold import unfolded, unfolding
from prismoe.train.updates import adamw

__all__ = ["Finished", "train"]


@dataclass(frozen=True)
class Finished:
    """How a run of the loop went: what `pretrain` puts into its receipt.

    `steps` were taken in all and `steps_run` by this command; `batches` were drawn, those passed over included.
    """

    resumed_from: int
    steps: int
    steps_run: int
    batches: int
    skipped: int
    went_back: int
    seconds: float
    num_routers: int


def train(
    model: Any,
    config: PretrainConfig,
    *,
    mixing: Mixing,
    engine: Engine,
    out: Path,
    plan: Plan | None,
    trained: bool,
    stop: StopRequest,
    on_progress: Progress,
    teacher: Teacher | None = None,
) -> Finished:
    """Train `model` in place for `config.steps` steps, going on from the newest checkpoint under `out`.

    Batches come from the mixture of `mixing`, whose weights it moves where it is due. Rank 0 writes `metrics.jsonl`
    in `out`; every process writes its part of `checkpoints/`. The scales of `plan`, which made the mixture, are
    unfolded as `config.unfold_scale` says (see `train.unfold`), and folded again at the end; `trained` says that its
    weights may have moved since then.

    Raises:
        InterruptedRun: `stop` was requested; the state is saved.
        NumericalError: a loss, gradient or router gradient that cannot be; no weight was changed by that step.
        ResourceError: another process is gone, or there is no disk for a checkpoint.
        UsageError: moved weights have used a domain up; the state is saved, and a larger `max_epochs` goes on.
    """
    with watch(model) as routers, unfolded(model, routers, unfolding(plan, model, routers, config.unfold_scale)):
        for router, known in zip(routers, all_on(plan, model, routers, trained=trained), strict=True):
            router.all_on = known
        policy = attach_policy(config.router, routers, arguments=config.arguments, all_reduce=engine.sum_with_gradient)
        optimizer = adamw([*model.parameters(), *policy.parameters().values()], config)
        health = Health(spike=config.spike, limit=config.skip_limit, rollbacks=config.rollbacks)
        trainer = Trainer(model, config, mixing.mixture, routers, policy, optimizer, engine, health, teacher)
        with engine.losing_others():
            drift = ExpertDrift(model, routers, total=engine.sum)  # before a checkpoint replaces what the source gave
            run = _Run(trainer, mixing, drift, out, stop, on_progress)
            try:
                return run.through()
            finally:
                run.close()
                policy.detach()


class _Run:
    """The steps of one command in order, with what has to be done between them."""

    def __init__(
        self,
        trainer: Trainer,
        mixing: Mixing,
        drift: ExpertDrift,
        out: Path,
        stop: StopRequest,
        on_progress: Progress,
    ) -> None:
        self.trainer, self.mixing, self.drift, self.out = trainer, mixing, drift, out
        self.stop, self.on_progress = stop, on_progress
        self.config, self.engine, self.health = trainer.config, trainer.engine, trainer.health
        self.folder = out / "checkpoints"
        self.saver = Saver(self.folder, keep=self.config.keep, engine=self.engine)
        self.step, self.evaluated, position = 0, False, 0
        self.lowest, self.no_better = math.inf, 0  # mean held-out loss, and evaluations in a row that did not lower it
        found = checkpoints.latest(self.folder, self.engine)
        muted = not self.engine.first
        self.scalars = Scalars(out / SCALARS, muted=muted)
        if found is not None:
            position = self._restore(found)
        else:
            self.scalars.begin(None)
        self.log = MetricsLog(out / "metrics.jsonl", position=position, muted=muted)
        flops = flops_per_token(trainer.model, seq_len=self.config.seq_len)
        if trainer.teacher is not None:
            flops += trainer.teacher.flops_per_token()
        engine = self.engine
        bf16 = self.config.precision == "bf16"
        self.peak = " of a measured product" if engine.device.type == "cpu" else ""
        self.timing = Timing(
            out / TIMING, flops=flops, world=engine.world, device=engine.device, muted=muted, bf16=bf16
        )

    def close(self) -> None:
        """Let go of the files; after an error, when what was being saved is."""
        with suppress(PrismoeError, RuntimeError):
            self.saver.wait()
        self.timing.close()
        self.log.sync()
        self.log.close()
        self.scalars.close()

    def through(self) -> Finished:
        """Every step that is left, then the last evaluation."""
        config, engine = self.config, self.engine
        first, started = self.step, time.monotonic()
        self.trainer.model.train()
        while True:
            if self._due() and not self.evaluated:
                self.evaluated = self._evaluate()
            stopping, failed = engine.each(bool(self.stop.signal_name), self.saver.failed)
            if failed:
                raise self.saver.give_up()
            save = config.save_every and self.step % config.save_every == 0 and first < self.step < config.steps
            enough = bool(config.max_steps) and self.step - first >= config.max_steps and self.step < config.steps
            used_up = self._used_up()
            if (save or stopping or enough or used_up) and self.step > 0:
                self._save()
            if stopping or enough or used_up:
                self.saver.wait()
            if stopping or enough:
                by = "max_steps" if enough else self.stop.signal_name or "another rank"
                raise InterruptedRun(
                    f"stopped by {by} after step {self.step} of {config.steps}",
                    where=str(self.out),
                    hint="the same command continues",
                )
            if self.step == config.steps or (config.patience and self.no_better >= config.patience):
                break
            if used_up:
                raise used_up
            self.timing.begin()
            line = self.trainer.step(self.step)
            clock = self.timing.step(self.step + 1, line["tokens"])
            self._note(line)
            if alarm := self.trainer.alarms.judge(self.step + 1):
                self._note(alarm)
            self.scalars.add("timing", clock)
            if line["event"] == "skipped" and self.health.must_go_back:
                self._go_back(line["found"])
                continue
            self.step, self.evaluated = self.step + 1, False
            shown = f"loss {line['loss']:.3f}" if "loss" in line else "left out"
            shown += f" · teacher {line['teacher_loss']:.3f}" if "teacher_loss" in line else ""
            shown += f" · MFU {clock['mfu']:.1%}{self.peak}" if "mfu" in clock else ""
            self.on_progress(
                f"train step: {shown}{in_short(line)}{self.trainer.alarms.in_short()}", self.step, config.steps
            )
        self.saver.wait()
        return Finished(
            resumed_from=first,
            steps=self.step,
            steps_run=self.step - first,
            batches=self.step + self.health.passed_over,
            skipped=self.health.skipped,
            went_back=self.health.went_back,
            seconds=time.monotonic() - started,
            num_routers=len(self.trainer.routers),
        )

    def _due(self) -> bool:
        every = self.config.eval_every
        at = self.step in (0, self.config.steps) or bool(every and self.step % every == 0)
        return at or self.mixing.due(self.step + self.health.passed_over)

    def _used_up(self) -> UsageError | None:
        """What the mixture has against the next batch: moved weights, or text left out, use a domain up early."""
        if self.step == self.config.steps:
            return None
        try:
            self.mixing.mixture.check(self.step + self.health.passed_over + 1)
        except UsageError as error:
            hint = "the state is saved: the same command with a larger pretrain.max_epochs continues"
            return UsageError(error.found, where=error.where, hint=hint)
        return None

    def _evaluate(self) -> bool:
        """Held-out losses into the log and to the mixing rule; False when a stop was requested on the way."""
        trainer = self.trainer
        try:
            found = heldout_losses(
                trainer.model,
                trainer.mixture,
                config=self.config,
                routers=trainer.routers,
                engine=self.engine,
                autocast=trainer.autocast,
                stop=lambda: bool(self.stop.signal_name),
                on_progress=self.on_progress,
            )
        except LeftEarly:
            return False
        if trainer.routers:
            found["expert_cosine"] = self.drift.cosines()
        self._note({"event": "eval", "step": self.step, **found})
        losses = {name: entry["loss"] for name, entry in found["heldout"].items()}
        mean = sum(losses.values()) / len(losses)
        self.no_better = 0 if mean < self.lowest else self.no_better + 1
        self.lowest = min(self.lowest, mean)
        moved = self.mixing.update(self.step + self.health.passed_over, losses)
        if moved is not None:
            self._note(moved)
        return True

    def _note(self, line: dict[str, Any]) -> None:
        self.log.write(line)
        self.scalars.add(line["event"], line)

    def _save(self) -> None:
        trainer = self.trainer
        self.log.sync()
        self.scalars.flush()
        state = {
            "step": self.step,
            "log": self.engine.from_first(self.log.position),
            "evaluated": self.evaluated,
            "history": self.mixing.mixture.history,
            "health": self.health.state(),
            "alarms": trainer.alarms.state(),
            "heldout": [self.lowest if math.isfinite(self.lowest) else None, self.no_better],
        }
        tensors = checkpoints.tensors_of(trainer.model, trainer.policy, trainer.optimizer)
        self.saver.save(tensors, step=self.step, state=state)

    def _restore(self, path: Path) -> int:
        """Take over a checkpoint; returns how long the log was then."""
        trainer = self.trainer
        state = checkpoints.restore(
            path, engine=self.engine, model=trainer.model, policy=trainer.policy, optimizer=trainer.optimizer
        )
        self.mixing.mixture.restore(state["history"])
        self.health.restore(state["health"])
        if "alarms" in state:  # no version before had them
            trainer.alarms.restore(state["alarms"])
        lowest, self.no_better = state["heldout"]
        self.lowest = math.inf if lowest is None else float(lowest)
        self.step, self.evaluated = int(state["step"]), bool(state["evaluated"])
        self.scalars.begin(self.step)
        return int(state["log"])

    def _go_back(self, found: str) -> None:
        """To the last checkpoint, and on from there with text that was not read yet."""
        self.saver.wait()
        health, there = self.health, checkpoints.latest(self.folder, self.engine)
        to = int(there.name[5:]) if there is not None else None
        health.go_back(step=self.step + 1, to=to, found=found)
        assert there is not None, "go_back refuses without a checkpoint"
        counters = {**health.state(), "norms": []}
        bad = self.step + 1
        self._restore(there)
        health.restore({**counters, "norms": health.state()["norms"]})
        self._note({"event": "rollback", "step": bad, "to": self.step, "passed_over": health.passed_over})
