"""From weights to weights: model, policy, adapters and trainer put together, and taken apart again."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from prismoe.checkpoint.finite import require_finite
from prismoe.errors import InterruptedRun, UsageError
from prismoe.progress import Progress
from prismoe.train import checkpoints
from prismoe.train.documents import check_apart
from prismoe.train.engine import Engine
from prismoe.train.engine.layout import Layout
from prismoe.train.experts import experts_in_use, use_experts
from prismoe.train.metrics import MetricsLog, read_metrics
from prismoe.train.model import load_model, save_model
from prismoe.train.origin import Origin
from prismoe.train.routers import Router, attach_policy
from prismoe.train.routing import watch
from prismoe.train.runtime import runtime
from prismoe.train.stopping import StopRequest
from prismoe.train.unfold import unfolded, unfolding
from prismoe.tune.heldout import heldout_losses, laid_out
from prismoe.tune.lora import adapted, merge
from prismoe.tune.rows import Rows, check_dataset
from prismoe.tune.settings import TuneConfig
from prismoe.tune.trainer import Seen, Tuner, Work, make_trainer, read_state
from prismoe.tune.watch import EXPERTS, Roles

__all__ = ["train"]

_PROBE = 128  # ids whose logits are compared when an adapter is merged
_ADAPTED = {"attention": ("attention",), "experts": EXPERTS, "shared": ("shared expert",)}


def train(
    origin: Origin,
    config: TuneConfig,
    rows: Rows,
    tokenizer: Any,
    out: Path,
    *,
    stop: StopRequest,
    on_progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tune the model of `origin` on `rows` and write it to `out/model`.

    Returns what the receipt has of the run, with the `files` of the model, and what it has of this command.

    Raises:
        InputError: a weight of `origin` is not finite; names its tensor.
    """
    check_dataset(rows)
    device = torch.device("cuda" if config.device == "cuda" or _has_cuda(config) else "cpu")
    engine = Engine(Layout(world=1), rank=0, device=device)
    with runtime(threads=config.threads) as found:
        model = load_model(origin.checkpoint.folder).to(device)
        if not all(bool(torch.stack(torch.aminmax(weight)).isfinite().all()) for weight in model.parameters()):
            require_finite(origin.checkpoint, sorted(origin.checkpoint.tensors))  # names the one
        use_experts(model, config.experts, device=device)
        computed = {"experts": experts_in_use(model), "device": device.type, **found}
        apart = _keeps_apart(model, config)
        if config.recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with (
            watch(model) as routers,
            unfolded(model, routers, unfolding(origin.plan(), model, routers, config.unfold_scale)),
        ):
            run = _Run(model, routers, config, rows, engine, out, stop, on_progress, apart=apart)
            model, result, clock = run.through(tokenizer)
        files = save_model(model, origin, out / "model", engine=engine)
    return {**result, "runtime": computed, "files": files}, clock


def _has_cuda(config: TuneConfig) -> bool:
    return config.device == "auto" and torch.cuda.is_available()


def _keeps_apart(model: Any, config: TuneConfig) -> bool:
    """Whether conversations may lie in one row.

    Raises:
        UsageError: they are to, and the model would mix them.
    """
    try:
        check_apart(model, seq_len=config.seq_len)
    except UsageError as error:
        if config.packing or config.micro_batch_size > 1:
            raise UsageError(
                error.found.removeprefix("document, but "),
                where="tune.packing" if config.packing else "tune.micro_batch_size",
                needed=error.needed,
                hint="tune.packing=false tune.micro_batch_size=1",
            ) from error
        return False
    return True


class _Run:
    """One command: the losses before, the steps that are left, the losses after."""

    def __init__(
        self,
        model: Any,
        routers: list[Router],
        config: TuneConfig,
        rows: Rows,
        engine: Engine,
        out: Path,
        stop: StopRequest,
        on_progress: Progress,
        *,
        apart: bool,
    ) -> None:
        self.model, self.routers, self.config, self.rows = model, routers, config, rows
        self.engine, self.out, self.stop, self.on_progress, self.apart = engine, out, stop, on_progress, apart

    def through(self, tokenizer: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        config, out = self.config, self.out
        folder = checkpoints.latest(out / "checkpoints", self.engine)
        before = read_state(folder) if folder is not None else None
        log = MetricsLog(out / "metrics.jsonl", position=before["log"] if before else 0)
        seen = Seen(**before["seen"]) if before else Seen()
        try:
            if before is None:
                log.write(
                    {"event": "eval", "step": 0, **self._evaluate(self.model, stop=lambda: bool(self.stop.signal_name))}
                )
            trainer = self._trainer(tokenizer, log, seen)
            started, tokens = time.monotonic(), seen.tokens
            trainer.run()
            step, steps = int(trainer.state.global_step), self.rows.steps
            seconds = time.monotonic() - started
            if step < steps:
                raise self._stopped(step)
            self.model = self._whole(trainer)
            # Adapters are merged by now: a signal is answered when what they made is written.
            log.write({"event": "eval", "step": step, **self._evaluate(self.model, stop=lambda: False)})
        finally:
            log.sync()
            log.close()
        lines = read_metrics(out / "metrics.jsonl")
        losses = [line["loss"] for line in lines if line["event"] == "step"]
        evals = [{k: v for k, v in line.items() if k != "event"} for line in lines if line["event"] == "eval"]
        result = {
            "roles": seen.table,
            "router": " + ".join(config.policies) if self.routers else None,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "heldout_before": evals[0],
            "heldout_after": evals[-1],
            "merged": self.merged,
            "expert_tokens": seen.load_LE,
            "warnings": self._warnings(evals[0], evals[-1]),
        }
        rate = (seen.tokens - tokens) / seconds if step > trainer.resumed_from else None
        return self.model, result, {"resumed_from": trainer.resumed_from, "seconds": seconds, "tokens_per_second": rate}

    def _trainer(self, tokenizer: Any, log: MetricsLog, seen: Seen) -> Tuner:
        """Policy, adapters and who trains, checked before the first step."""
        config, model, routers = self.config, self.model, self.routers
        names = config.policies[0] if len(config.policies) == 1 else config.policies
        policy = attach_policy(names, routers, arguments=config.arguments)
        self.policy = policy
        frozen = config.router_training == "freeze"
        if frozen:
            for parameter in (p for router in routers for p in router.module.parameters()):
                parameter.requires_grad_(False)
            for parameter in policy.parameters().values():
                parameter.requires_grad_(False)
        if config.lora_rank:
            self.model = adapted(model, config, routers)
        roles = Roles(self.model, routers, list(policy.parameters().values()))
        wanted = [role for role in roles if not (frozen and role.startswith("router"))]
        adapters: list[str] = []
        if config.lora_rank:
            asked = [role for target in config.lora_targets for role in _ADAPTED[target]]
            adapters = [role for role in wanted if role in asked]
            wanted = [role for role in wanted if role.startswith("router")]
        roles.check_trainable(wanted, adapted=adapters)
        moved = [role for role in (*wanted, *adapters) if role != "router"]  # it has a guard with patience
        work = Work(
            config=config,
            out=self.out,
            engine=self.engine,
            routers=routers,
            policy=policy,
            roles=roles,
            autocast=self._autocast(),
            trained_roles=moved,
            balances=bool(routers) and _balances(config),
            log=log,
            stop=self.stop,
            on_progress=self.on_progress,
            seen=seen,
        )
        return make_trainer(self.model, work, self.rows, tokenizer)

    def _whole(self, trainer: Tuner) -> Any:
        """The stock model, adapters merged."""
        self.policy.detach()
        self.merged: dict[str, Any] | None = None
        if not self.config.lora_rank:
            return self.model
        ids = laid_out(self.rows.text.heldout[:1])["input_ids"][:, :_PROBE].to(self.engine.device)
        model, found = merge(self.model, probe_BT=ids, load_LE=trainer.work.seen.load_LE)
        self.merged = asdict(found)
        return model

    def _evaluate(self, model: Any, *, stop: Callable[[], bool]) -> dict[str, Any]:
        found = heldout_losses(
            model,
            self.rows.text.heldout,
            seq_len=self.config.seq_len,
            routers=self.routers,
            device=self.engine.device,
            autocast=self._autocast(),
            apart=self.apart,
            stop=stop,
            on_progress=self.on_progress,
        )
        if found is None:
            raise self._stopped(0)
        return found

    def _autocast(self) -> Callable[[], AbstractContextManager[Any]]:
        if self.config.precision == "fp32":
            return nullcontext
        return lambda: torch.autocast(self.engine.device.type, torch.bfloat16)

    def _stopped(self, step: int) -> InterruptedRun:
        by = self.stop.signal_name or "max_steps"
        return InterruptedRun(
            f"stopped by {by} after step {step} of {self.rows.steps}",
            where=str(self.out),
            hint="the same command continues",
        )

    def _warnings(self, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
        """What a person should look at."""
        found = []
        if after["loss"] >= before["loss"]:
            found.append(f"held-out loss did not fall: {before['loss']:.4f} to {after['loss']:.4f}")
        if self.routers and not _balances(self.config):
            found.append("no balance loss: tune.router has none, or its coefficient is 0")
        if after.get("idle", 0) > before.get("idle", 0):
            found.append(f"{after['idle']} experts without a token of held-out conversations, {before['idle']} before")
        return found


def _balances(config: TuneConfig) -> bool:
    """Whether a policy with a loss of its own is at work."""
    each = [config.arguments] if len(config.policies) == 1 else list(config.arguments.values())
    return any(float(arguments.get("coefficient", 0.0)) > 0 for arguments in each)
