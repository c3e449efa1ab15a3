"""Faults in the numbers of a training run: what is planted in which step, and what was seen of the weights after it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.torture.world import rank, together

__all__ = ["EXPERTS", "Planted", "Result", "in_tuning", "result", "train"]

EXPERTS = {"starved": (0, {3: -2.0}), "dominant": (1, {0: 2.0}), "collapsed": (2, {0: 2.0, 1: 2.0})}
"""Layer of a fault in routing, and what is added to the shares of its experts where it chooses."""


@dataclass(frozen=True)
class Planted:
    """A run of `world` processes with `faults`, kinds by step, counted in each process from 1.

    What is not finite is planted by the last process alone. With `again` the same command follows without a fault.
    """

    name: str
    world: int
    faults: Mapping[int, tuple[str, ...]]
    settings: tuple[str, ...]
    again: bool = False
    words: tuple[str, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Result:
    """How rank 0 ended, and the same command after it; `seen` of all ranks after every step, and the log of the run."""

    code: int
    error: str
    again: int | None
    receipt: dict[str, Any]
    seen: list[dict[str, Any]]
    log: list[dict[str, Any]]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == name]

    @property
    def weights_wrong(self) -> str | None:
        """A step after which a number of the training state is not finite, or that did what its event does not say."""
        for line in self.seen:
            if not line["finite"]:
                return f"a weight or moment is not finite after step {line['step']}"
            if line["changed"] != (line["event"] == "step"):
                did = "did" if line["changed"] else "did not"
                return f"step {line['step']} is {line['event']}, and the weights {did} change"
        return None if self.seen else "no step was made"

    @property
    def ended(self) -> str:
        return f"exit {self.code}, {self.error.strip().rpartition(chr(10))[2][:300]}"


def train(run: Planted, out: Path) -> str | None:
    """Do it in `out`, for `result`; says when its processes ended in different ways."""
    words, log = ["pretrain", *run.words, "--out", str(out), "--json", *run.settings], out.with_name(f"{out.name}-log")
    seen, install = out.with_suffix(".seen"), _install(run.faults, out.with_suffix(".seen"))
    ended = together(words, world=run.world, log=log, before=install, timeout=900)
    shutil.copy(out / "train/metrics.jsonl", out.with_suffix(".metrics"))  # a run that goes on cuts it off first
    again = together(words, world=run.world, log=log, timeout=900)[0].code if run.again else None
    found = {"code": ended[0].code, "error": ended[0].error, "again": again, "out": ended[0].out}
    out.with_suffix(".json").write_text(json.dumps({**found, "world": run.world}))
    assert seen.with_name(f"{seen.name}-0").exists(), found
    codes = [one.code for one in ended]
    return None if len(set(codes)) == 1 else f"{codes}: {[one.last_line[:200] for one in ended]}"


def result(out: Path) -> Result:
    """Of a run that `train` made in `out`."""
    found = json.loads(out.with_suffix(".json").read_text())
    receipt = json.loads(found["out"]) if found["code"] == 0 else {}
    files = [out.with_suffix(f".seen-{number}") for number in range(found["world"])]
    seen, log = (
        [json.loads(line) for path in paths for line in path.read_text().splitlines()]
        for paths in (files, [out.with_suffix(".metrics")])
    )
    return Result(found["code"], found["error"], found["again"], receipt, seen, log)


def in_tuning(value: float, where: str, step: int) -> None:
    """Plant `value` in a gradient, or in the loss, of one step of `tune` in this process."""
    from prismoe.tune.trainer import Tuner

    clip, lost = Tuner._clip_grad_norm, Tuner.compute_loss

    def damaged_gradient(self: Tuner, model: Any) -> Any:
        if self.state.global_step + 1 == step:
            next(weight.grad for weight in model.parameters() if weight.grad is not None).view(-1)[0] = value
        return clip(self, model)

    def damaged_loss(self: Tuner, *args: Any, **named: Any) -> Any:
        loss = lost(self, *args, **named)
        return loss * value if self.state.global_step + 1 == step else loss

    if where == "gradient":
        Tuner._clip_grad_norm = damaged_gradient  # type: ignore[method-assign]
    else:
        Tuner.compute_loss = damaged_loss  # type: ignore[method-assign]


def _install(faults: Mapping[int, tuple[str, ...]], log: Path) -> Callable[[], None]:
    """Plant; and after every step write whether the weights changed and all of the training state is finite."""

    def install() -> None:
        import torch

        from prismoe.train.checkpoints import tensors_of
        from prismoe.train.trainer import Trainer

        now = _Now(faults)
        _break(now)
        real = Trainer.step

        def state(self: Trainer) -> tuple[str, bool]:
            digest, finite = hashlib.sha256(), True
            for tensor in tensors_of(self.model, self.policy, self.optimizer).values():
                local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
                digest.update(local.contiguous().numpy().tobytes())
                finite = finite and bool(torch.isfinite(local).all())
            return digest.hexdigest(), finite

        def step(self: Trainer, number: int) -> dict[str, Any]:
            now.step += 1
            before, _ = state(self)
            line = real(self, number)
            after, finite = state(self)
            found = {"step": number + 1, "event": line["event"], "changed": after != before, "finite": finite}
            with log.with_name(f"{log.name}-{rank()}").open("a") as file:
                file.write(json.dumps(found) + "\n")
            return line

        Trainer.step = step  # type: ignore[method-assign]

    return install


class _Now:
    """What is planted in the step that is being made."""

    def __init__(self, faults: Mapping[int, tuple[str, ...]]) -> None:
        self._faults, self.step = faults, 0
        self._last = rank() == int(os.environ["WORLD_SIZE"]) - 1

    def has(self, kind: str) -> bool:
        return kind in self._faults.get(self.step, ())

    def number(self, where: str) -> float | None:
        """NaN or infinity, if this process is to plant one there."""
        kinds = [kind for kind in self._faults.get(self.step, ()) if kind.endswith(where)]
        return float(kinds[0].split()[0].lower()) if kinds and self._last else None


def _break(now: _Now) -> None:
    import torch
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    from prismoe.train import trainer

    norms, text_loss = trainer.norms, trainer.text_loss
    plain, route = torch.nn.Embedding.forward, MixtralTopKRouter.forward
    routers: list[Any] = []

    def damaged_norms(groups: Any, engine: Any) -> Any:
        """As `trainer` calls it: all gradients are there."""
        held = [parameter.grad for parameter in groups[0] if parameter.grad is not None]
        local = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in held]
        if now.has("gradient spike"):
            torch._foreach_mul_(local, 1e4)
        if (number := now.number("gradient")) is not None:
            next(part for part in local if part.numel()).view(-1)[0] = number
        return norms(groups, engine)

    def damaged_loss(*args: Any, **named: Any) -> Any:
        factor = 1e4 if now.has("loss spike") else 1.0
        loss, loss_BT = text_loss(*args, **named)
        return loss * factor, loss_BT * factor

    def embedded(module: Any, ids: Any) -> Any:
        found, number = plain(module, ids), now.number("batch")
        if number is None or not module.training:
            return found
        found = found.clone()
        found[0, 3, 5] = number
        return found

    def chosen(router: Any, hidden: Any) -> Any:
        """The router of a layer chooses with a bias; what its weights say of the experts stays as it was."""
        if router not in routers:
            routers.append(router)
        kinds = [kind for kind, (layer, _) in EXPERTS.items() if now.has(kind) and router is routers[layer]]
        if not kinds:
            return route(router, hidden)
        logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
        shares = torch.softmax(logits.float(), dim=-1)
        bias = torch.zeros(shares.shape[-1])
        for expert, added in EXPERTS[kinds[0]][1].items():
            bias[expert] = added
        chosen = torch.topk(shares + bias, router.top_k, dim=-1).indices
        scores = shares.gather(-1, chosen)
        return logits, scores / scores.sum(dim=-1, keepdim=True), chosen

    trainer.norms, trainer.text_loss = damaged_norms, damaged_loss  # type: ignore[assignment]
    torch.nn.Embedding.forward = embedded  # type: ignore[method-assign]
    MixtralTopKRouter.forward = chosen  # type: ignore[method-assign]
