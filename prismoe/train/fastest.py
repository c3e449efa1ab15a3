"""`pretrain.experts: fastest`: of the experts functions that are here, the one that a short trial finds fastest.

The experts of a layer, of their real sizes but with drawn weights, compute some drawn tokens forward and backward in
the precision of the run. A function is in the running if what it gives and every gradient is that of the library's
eager one (relative norm of the difference at most 1e-4 in float32, 3e-2 in bfloat16), with the same bits twice. Of
these the least median of five rounds, all in turn, by the clock on the wall, is chosen; what `experts.rule` says is,
where it is within 5 % of that. One that takes twice the best at first is not timed further.

Rank 0 tries and all others take what it chose. The choice is kept beside the training state, so that a run that goes
on computes by the same function: another one would have other bits.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prismoe.errors import InputError, PrismoeError, UsageError
from prismoe.folder import write_json_atomic
from prismoe.progress import Progress
from prismoe.train.checkpoints import latest
from prismoe.train.engine import Engine
from prismoe.train.experts import experts_functions, experts_of, rule
from prismoe.train.model import empty_model
from prismoe.train.origin import Origin
from prismoe.train.settings import PretrainConfig
from prismoe.train.speed import experts_per_token

__all__ = ["CHOICE", "Trial", "chosen_experts", "try_experts"]

CHOICE = "experts.json"  # in the folder of a run: a `Trial` for each kind of device that it was computed on
_ROUNDS = 5
_MOST_TOKENS = {"cpu": 1024, "cuda": 16384}
_LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
_NEAR = 1.05  # times as long, and still as good as the rule's
_MOST_COPIED = 64 << 20  # bytes
_FROM_HUB = ("sonicmoe", "deepgemm")


@dataclass(frozen=True)
class Trial:
    """`function` was chosen; median `milliseconds` of each that was right, and why others are `left_out`."""

    function: str
    tokens: int
    milliseconds: dict[str, float]
    left_out: dict[str, str]

    def __str__(self) -> str:
        times = ", ".join(
            f"{name} {ms:.2f}" for name, ms in sorted(self.milliseconds.items(), key=lambda item: item[1])
        )
        return f"{self.function} ({times} ms for {self.tokens} tokens)"


def chosen_experts(origin: Origin, config: PretrainConfig, *, engine: Engine, out: Path, on_progress: Progress) -> str:
    """By what function the experts of the run in `out` compute: `config.experts`, or for "fastest" what was found.

    Every process calls this. A run that goes on keeps what it began with; on a device of another kind, where the bits
    are others in any case, it is tried anew.

    Raises:
        InputError: what a run began with cannot be read.
        UsageError: what a run began with is not here, or no function computes what the eager one does.
    """
    if config.experts != "fastest" or not origin.num_experts:
        return config.experts
    begun = latest(out / "checkpoints", engine) is not None
    names, path, shown, number = list(experts_functions()), out / CHOICE, "", 0
    if engine.first:
        function = _recorded(path, engine.device.type, begun=begun)
        shown = f"{function}, as before the stop"
        if function == _NONE:
            trial = _trial(origin, config, engine)
            function, shown = trial.function or _WRONG, str(trial)
            if trial.function:
                write_json_atomic(path, {**_record(path), engine.device.type: asdict(trial)})
        number = names.index(function) if function in names else -1 - [_WRONG, _DAMAGED, function].index(function)
    number = engine.from_first(number)
    if number < 0:
        raise _refusal(-1 - number, path)
    if engine.first:
        on_progress(f"experts: {shown}", 1, 1)
    return names[number]


_NONE, _WRONG, _DAMAGED = "", "none is right", "damaged"


def _record(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _recorded(path: Path, device: str, *, begun: bool) -> str:
    try:
        record = _record(path)
        if record or not begun:
            return str(record[device]["function"]) if device in record else _NONE
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return _DAMAGED


def _trial(origin: Origin, config: PretrainConfig, engine: Engine) -> Trial:
    model = empty_model(origin.config, where=str(origin.checkpoint.folder))
    return try_experts(
        experts_of(model)[0],
        tokens=(config.micro_batch_size or config.batch_size // engine.world) * config.seq_len,
        top_k=experts_per_token(model.config)[0],
        device=engine.device,
        bf16=config.precision == "bf16",
        apart=engine.layout.experts,
    )


def _refusal(case: int, path: Path) -> PrismoeError:
    if case == 0:
        return UsageError("fastest, but none computes what eager does", where="pretrain.experts", hint="experts=auto")
    hint = "put it back, or --force begins anew"
    if case == 1:
        return InputError("by what function the experts of this run compute cannot be read", where=str(path), hint=hint)
    return UsageError("the experts function that this run began with is not here", where=str(path), hint=hint)


def try_experts(module: Any, *, tokens: int, top_k: int, device: torch.device, bf16: bool, apart: int = 1) -> Trial:
    """Try every function on a copy of `module`, a stock module of experts (only its shapes count).

    Where whole experts are shared out over `apart` processes it is the whole layer all the same that is tried.
    """
    tokens = min(tokens, _MOST_TOKENS.get(device.type, _MOST_TOKENS["cuda"]))
    case = _Case(module, tokens=tokens, top_k=top_k, device=device, bf16=bf16)
    exact = case.through("eager")
    seconds: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    for name in experts_functions():
        hindrance = case.hindrance(name, apart=apart)
        if hindrance is None:
            try:
                hindrance, spent = case.check(name, exact)
                seconds |= {} if hindrance else {name: [spent]}
            except Exception as error:  # noqa: BLE001 - kernels fail in ways of their own
                hindrance = (str(error).strip() or type(error).__name__).partition("\n")[0][:160]
        if hindrance is not None:
            left_out[name] = hindrance
    if not seconds:
        return Trial("", tokens, {}, left_out)
    least = min(spent for (spent,) in seconds.values())
    running = [name for name, (spent,) in seconds.items() if spent <= 2 * least]
    for _ in range(_ROUNDS):
        for name in running:
            seconds[name].append(case.seconds(name))
    medians = {name: statistics.median(spent[1:] or spent) for name, spent in seconds.items()}
    best, usual = min(running, key=lambda name: medians[name]), rule([module], device=device)
    if usual in running and medians[usual] <= _NEAR * medians[best]:
        best = usual
    return Trial(best, tokens, {name: round(1e3 * spent, 4) for name, spent in medians.items()}, left_out)


class _Case:
    """A copy of a module with drawn weights, and drawn tokens; nobody else's random numbers are touched."""

    def __init__(self, module: Any, *, tokens: int, top_k: int, device: torch.device, bf16: bool) -> None:
        self.device, self.bf16 = device, bf16
        self.dtype = torch.bfloat16 if bf16 else torch.float32
        held = self.dtype if device.type != "cpu" else torch.float32  # as `engine.placement` and the trainer have it
        self.module = copy.deepcopy(module).to_empty(device=device).to(held)
        draw = torch.Generator(device).manual_seed(0)
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=draw)
        hidden = self.module.down_proj.shape[2 if self.module.is_transposed else 1]

        def drawn(*shape: int, dtype: torch.dtype = held) -> torch.Tensor:
            return torch.randn(*shape, generator=draw, device=device).to(dtype)

        self.x_TD, self.slopes_TD = drawn(tokens, hidden).requires_grad_(), drawn(tokens, hidden)
        logits_TE = drawn(tokens, module.num_experts, dtype=torch.float32)
        weights_TK, self.index_TK = logits_TE.softmax(dim=-1).topk(min(top_k, module.num_experts))
        self.weights_TK = weights_TK.requires_grad_()

    def hindrance(self, name: str, *, apart: int) -> str | None:
        """Why `name` is not even tried."""
        each = sum(weight.numel() for weight in self.module.parameters()) // self.module.num_experts
        copied = each * self.index_TK.numel() * self.dtype.itemsize
        if name == "batched_mm" and copied > _MOST_COPIED:
            return f"copies an expert for every choice: {copied / 1e9:.1f} GB"
        if name == "liger" and apart > 1:
            return "experts are shared out over processes"
        if name in _FROM_HUB and find_spec("kernels") is None:
            return "package kernels is not installed"
        if name in _FROM_HUB and os.environ.get("HF_HUB_OFFLINE") not in ("1", "true", "True", "ON", "YES"):
            return "would be downloaded; with HF_HUB_OFFLINE=1 the one in the cache is tried"
        return None

    def through(self, name: str) -> dict[str, torch.Tensor]:
        """Forward and backward by `name`: what comes out, and every gradient."""
        self.module.config._experts_implementation = experts_functions()[name]
        leaves = {"x": self.x_TD, "weights": self.weights_TK, **dict(self.module.named_parameters())}
        with self._autocast():
            out_TD = self.module(self.x_TD, self.index_TK, self.weights_TK)
        gradients = torch.autograd.grad(out_TD, list(leaves.values()), self.slopes_TD.to(out_TD.dtype))
        return {"the output": out_TD.detach(), **dict(zip(leaves, gradients, strict=True))}

    def check(self, name: str, exact: Mapping[str, torch.Tensor]) -> tuple[str | None, float]:
        """What is wrong with what `name` computes, and the seconds of its second time."""
        found = self.through(name)
        begin = self._now()
        again = self.through(name)
        spent = self._now() - begin
        for part, wanted in exact.items():
            error = float((found[part].float() - wanted.float()).norm() / wanted.float().norm())
            if not error <= _LARGEST_ERROR[self.dtype]:
                return f"{part} is off by {error:.1e}", spent
            if not torch.equal(found[part], again[part]):
                return f"{part} has other bits the second time", spent
        return None, spent

    def seconds(self, name: str) -> float:
        begin = self._now()
        self.through(name)
        return self._now() - begin

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _autocast(self) -> AbstractContextManager[Any]:
        on = self.bf16 and self.device.type == "cpu"
        return torch.autocast("cpu", torch.bfloat16) if on else nullcontext()
