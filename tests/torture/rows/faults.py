"""Numbers that cannot be, planted in weights, batches and gradients; experts that collapse or starve."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.processes import command
from tests.torture.world import rank, together

SECONDS = 120
TENSORS = (
    *("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"),
    *("model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight"),
)
UP = "model.layers.2.mlp.up_proj.weight"
READERS = ("convert", "calibrate", "pretrain")  # of every weight; `plan` reads what its method looks at
KINDS = ("NaN in a batch", "Inf in a batch", "NaN in a gradient", "Inf in a gradient", "gradient spike", "loss spike")
TRAINING = ("pretrain.max_epochs=1000", "pretrain.eval_every=0", "pretrain.save_every=10", "pretrain.keep=99")
AT, STEPS = 20, 24
SOON = 50  # steps


def run(place: Place) -> Iterator[Outcome]:
    before = place.folder / "before"
    for stage in ("plan", "convert", "prepare"):
        place.command(stage, str(place.config), "--out", str(before))
    yield _weights(place, before)
    yield _skipped(place, before)
    yield _too_often(place, before)
    yield _alarms(place, before)


def _weights(place: Place, before: Path) -> Outcome:
    cases: dict[str, str | None] = {}
    for value in ("nan", "inf", "-inf"):
        for name in TENSORS:
            source = place.fresh("damaged", Path(place.folder / "inputs/dense"))
            _plant(source / "model.safetensors", name, float(value), place.draw.random())
            for verb in (*(("plan",) if name == UP else ()), *READERS):
                out = place.fresh("run")
                words = [str(place.config), "--out", str(out), f"source={source}", "pretrain.model=dense"]
                words += {"plan": ["plan.method=clustering"], "calibrate": ["calibrate.max_tokens=200"]}.get(verb, [])
                if verb == "convert":
                    place.command("plan", *words)
                if verb in ("calibrate", "pretrain"):
                    place.command("prepare", *words)
                done = command([verb, *words], log=place.folder / "log")
                named = name in done.last_line
                wrong = None if done.code in (3, 5) and named else f"exit {done.code}, {done.last_line[:200]}"
                cases[f"{value} in {name}, {verb}"] = wrong
    return Outcome.of(
        "NaN or infinity in one weight of the source: refused by the verb that reads it, naming the tensor",
        cases,
        goal=3 * (len(TENSORS) * len(READERS) + 1),
        note=f"{len(TENSORS)} tensors; plan, {', '.join(READERS)}",
    )


def _plant(path: Path, name: str, value: float, where: float) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = name if name in tensors else "model.embed_tokens.weight"
    tensors[name].view(-1)[int(where * tensors[name].numel())] = value
    save_file(tensors, path, {"format": "pt"})


def _skipped(place: Place, before: Path) -> Outcome:
    cases: dict[str, str | None] = {}
    for world in (1, 2):
        for precision in ("fp32", "bf16"):
            for kind in KINDS:
                out = place.fresh("run", before)
                ended, seen = _trained(place, out, world, _Fault(kind, range(AT, AT + 1)), precision=precision)
                skipped = [one["step"] for one in seen if one["event"] == "skipped"]
                wrong = _weights_wrong(seen)
                if ended.code != 0:
                    wrong = f"exit {ended.code}, {ended.last_line}"
                elif skipped != [AT]:
                    wrong = wrong or f"left out: {skipped}"
                elif "skipped" not in json.loads(ended.out):
                    wrong = wrong or "not in the receipt"
                cases[f"{kind} at step {AT}, {precision}, {world} processes"] = wrong
    return Outcome.of(
        "NaN or infinity in a batch or a gradient of one process, a spike of gradient or loss: "
        "the step is left out and logged, the weights stay finite",
        cases,
        goal=24,
    )


def _too_often(place: Place, before: Path) -> Outcome:
    cases: dict[str, str | None] = {}
    for world in (1, 2):
        for kind in KINDS[:4]:
            out = place.fresh("run", before)
            ended, seen = _trained(place, out, world, _Fault(kind, range(15, 18)))
            back = [line for line in _log(out) if line["event"] == "rollback"]
            wrong = _weights_wrong(seen)
            if ended.code != 0 or [line["to"] for line in back] != [10]:
                wrong = f"exit {ended.code}, went back {len(back)} times, {ended.last_line}"
            cases[f"{kind} in steps 15 to 17, {world} processes: back to 10, then on"] = wrong
            out = place.fresh("run", before)
            ended, seen = _trained(place, out, world, _Fault(kind, range(15, 1000)))
            back = [line for line in _log(out) if line["event"] == "rollback"]
            again, _ = _trained(place, out, world, None)
            wrong = _weights_wrong(seen)
            if (ended.code, len(back), again.code) != (5, 2, 0) or "it went back 2 times" not in ended.error:
                wrong = f"exit {ended.code}, then {again.code}, went back {len(back)} times, {ended.last_line}"
            cases[f"{kind} from step 15 on, {world} processes: back twice, then exit 5"] = wrong
    return Outcome.of(
        "three such steps in a row: back to the last checkpoint and on with other text; for ever: exit 5 after going "
        "back twice, and without the fault the same command ends the run",
        cases,
        goal=16,
    )


def _alarms(place: Place, before: Path) -> Outcome:
    cases: dict[str, str | None] = {}
    latest = 0
    for world in (1, 2):
        for kind in ("starved", "dominant"):
            for at in (1, 26, 50):
                out = place.fresh("run", before)
                ended, _ = _trained(place, out, world, _Fault(kind, range(at, 1000)), steps=at + SOON)
                expert = {"starved": 3, "dominant": 0}[kind]
                raised = [
                    line["step"]
                    for line in _log(out)
                    if line["event"] == "alarm" and (1, expert) in [(one["layer"], one["expert"]) for one in line[kind]]
                ]
                told = f"{kind} since step" in " ".join(json.loads(ended.out)["warnings"]) if ended.code == 0 else False
                after = raised[0] - at if raised else 999
                wrong = None if 0 <= after <= SOON and told else f"exit {ended.code}, alarms at {raised}, told: {told}"
                latest = max(latest, after)
                cases[f"{kind} from step {at}, {world} processes"] = wrong
    return Outcome.of(
        f"a router that sends every token to one expert, or none to one: an alarm within {SOON} steps names layer and "
        "expert, in the log and in the receipt",
        cases,
        goal=12,
        note=f"the latest after {latest} steps",
    )


class _Fault:
    """`kind` in the steps `when` (counted in this process, from 1), planted by the last process alone."""

    def __init__(self, kind: str, when: range) -> None:
        self.kind, self.when, self.step = kind, when, 0

    def install(self) -> None:
        import torch

        from prismoe.train import trainer

        last = rank() == int(os.environ["WORLD_SIZE"]) - 1
        value = float(self.kind[:3].lower()) if " in a " in self.kind else 0.0
        norms, text_loss = trainer.norms, trainer.text_loss

        def now() -> bool:
            return self.step in self.when

        def damaged_norms(groups: Any, engine: Any) -> Any:
            if now() and (self.kind == "gradient spike" or (last and self.kind.endswith("gradient"))):
                for parameter in groups[0]:
                    local = parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
                    if self.kind == "gradient spike":
                        local.mul_(1e4)
                    elif local.numel():
                        local.view(-1)[0] = value
            return norms(groups, engine)

        def damaged_loss(*args: Any, **named: Any) -> Any:
            loss, loss_BT = text_loss(*args, **named)
            return (loss * 1e4, loss_BT * 1e4) if now() and self.kind == "loss spike" else (loss, loss_BT)

        trainer.norms, trainer.text_loss = damaged_norms, damaged_loss  # type: ignore[assignment]
        if self.kind.endswith("batch") and last:
            plain = torch.nn.Embedding.forward

            def embedded(module: Any, ids: Any) -> Any:
                found = plain(module, ids)
                if now() and module.training:
                    found = found.clone()
                    found[0, 3, 5] = value
                return found

            torch.nn.Embedding.forward = embedded  # type: ignore[method-assign]
        if self.kind in ("starved", "dominant"):
            self._choose()

    def _choose(self) -> None:
        """The router of layer 1 chooses with a bias; what its weights say of the experts stays as it was."""
        import torch
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

        routers: list[Any] = []
        plain = MixtralTopKRouter.forward

        def forward(router: Any, hidden: Any) -> Any:
            if router not in routers:
                routers.append(router)
            if self.step not in self.when or router is not routers[1]:
                return plain(router, hidden)
            logits = torch.nn.functional.linear(hidden.reshape(-1, router.hidden_dim), router.weight)
            shares = torch.softmax(logits.float(), dim=-1)
            bias = torch.zeros(shares.shape[-1])
            bias[3 if self.kind == "starved" else 0] = -2.0 if self.kind == "starved" else 2.0
            chosen = torch.topk(shares + bias, router.top_k, dim=-1).indices
            scores = shares.gather(-1, chosen)
            return logits, scores / scores.sum(dim=-1, keepdim=True), chosen

        MixtralTopKRouter.forward = forward  # type: ignore[method-assign]


def _trained(
    place: Place, out: Path, world: int, fault: _Fault | None, *, precision: str = "fp32", steps: int = STEPS
) -> tuple[Any, list[dict[str, Any]]]:
    """A run with a fault: how rank 0 ended, and what was seen after every step of any process."""
    seen = out.with_suffix(".seen")
    words = ["pretrain", str(place.config), "--out", str(out), "--json", *TRAINING]
    words += [f"pretrain.steps={steps}", f"pretrain.precision={precision}"]
    before = _watched(seen, fault) if fault is not None else None
    ended = together(words, world=world, log=place.folder / "log", before=before)
    lines = []
    for path in place.folder.glob("run.seen-*"):
        lines += [{**json.loads(line), "rank": path.suffix} for line in path.read_text().splitlines()]
        path.unlink()
    codes = {one.code for one in ended}
    first = [line for line in lines if line["rank"].endswith("-0")]
    assert len(codes) == 1, [(one.code, one.last_line) for one in ended]
    bad = [line for line in lines if not line["finite"] and line not in first]
    return ended[0], first + bad


def _weights_wrong(seen: list[dict[str, Any]]) -> str | None:
    for line in seen:
        if not line["finite"]:
            return f"a weight or moment is not finite after step {line['step']}"
        if line["changed"] != (line["event"] == "step"):
            return (
                f"step {line['step']} is {line['event']}, and the weights did{'' if line['changed'] else ' not'} change"
            )
    return None if seen else "no step was made"


def _watched(log: Path, fault: _Fault) -> Callable[[], None]:
    """After every step: whether the weights changed, and all of the training state is finite, into `log`-RANK."""

    def install() -> None:
        import torch

        from prismoe.train.checkpoints import tensors_of
        from prismoe.train.trainer import Trainer

        real = Trainer.step
        fault.install()

        def state(self: Trainer) -> list[torch.Tensor]:
            found = tensors_of(self.model, self.policy, self.optimizer).values()
            return [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in found]

        def digest(tensors: list[torch.Tensor]) -> str:
            whole = hashlib.sha256()
            for tensor in tensors:
                whole.update(tensor.contiguous().numpy().tobytes())
            return whole.hexdigest()

        def step(self: Trainer, number: int) -> dict[str, Any]:
            fault.step += 1
            before = digest(state(self))
            line = real(self, number)
            now = state(self)
            seen = {
                "step": number + 1,
                "event": line["event"],
                "changed": digest(now) != before,
                "finite": all(bool(torch.isfinite(tensor).all()) for tensor in now),
            }
            with log.with_name(f"{log.name}-{rank()}").open("a") as file:
                file.write(json.dumps(seen) + "\n")
            return line

        Trainer.step = step  # type: ignore[method-assign]

    return install


def _log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "train/metrics.jsonl").read_text().splitlines()]
