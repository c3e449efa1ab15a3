"""A layer's mixture learns its dense FFN: the squared error of its output, then what every K would cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from prismoe.calibrate.states import States
from prismoe.data.permutation import round_keys
from prismoe.errors import NumericalError
from prismoe.recover.block import Block
from prismoe.recover.settings import RecoverConfig
from prismoe.train.routers import Moment, attach_policy
from prismoe.train.routing import watch
from prismoe.train.schedule import learning_rate
from prismoe.train.weighting import weighting

__all__ = ["Lesson", "Measured", "learn", "measure", "squared_error"]

Rows = npt.NDArray[np.int64]
ROWS = 1024  # tokens at a time where nothing is learned
WARMUP, FLOOR, CLIP = 1 / 20, 0.1, 1.0
NO_FACTOR = 2.0**-9  # so near to 1 it is rounding, and bfloat16 weights would stay as they are: copies keep their bytes


@dataclass(frozen=True, eq=False)
class Lesson:
    """What enters a dense FFN and what leaves it, [N, T, D] each; `rows` are the tokens to take, as n·T + t."""

    inputs: States
    outputs: States
    rows: Rows
    device: torch.device

    def take(self, rows_S: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """[S, D] inputs and outputs of some tokens, in float32."""
        return self.inputs.rows(rows_S, device=self.device).float(), self.outputs.rows(
            rows_S, device=self.device
        ).float()

    def pieces(self) -> list[Rows]:
        return [self.rows[start : start + ROWS] for start in range(0, len(self.rows), ROWS)]


@dataclass(frozen=True)
class Measured:
    """A mixture against its FFN, with each number K = 1 … E of experts on.

    Attributes:
        errors: ‖c·routed + rest - FFN‖ / ‖FFN‖ for K = 1 … E.
        factors: the c of each: 1 for the K that it has, the best one (least squares) for others, which a folder
            can hold by its down matrices; 1 where that is rounding.
        mass: mean share of the K largest router scores in their sum.
        load: share of the assignments that go to each expert, with the K that it has.
    """

    errors: tuple[float, ...]
    factors: tuple[float, ...]
    mass: tuple[float, ...]
    load: tuple[float, ...]


def learn(
    block: Block,
    lesson: Lesson,
    config: RecoverConfig,
    *,
    layer: int,
    top_k: int,
    on_step: Callable[[int, int, float], None],
) -> None:
    """Minimise Σ‖block(x) - y‖² / Σ‖y‖², the denominator that of all tokens, plus the balance loss; `config.lr` is set.

    Raises:
        NumericalError: a loss that is not finite.
    """
    assert config.lr is not None
    size = min(config.batch_tokens, len(lesson.rows))
    batches = len(lesson.rows) // size
    steps = config.epochs * batches
    energy = _energy(lesson) / len(lesson.rows)
    draw = np.random.Generator(np.random.Philox(key=round_keys("recover", config.seed, f"order {layer}")[:2]))
    optimizer = torch.optim.AdamW(block.parameters, lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0)
    autocast = torch.autocast(lesson.device.type, torch.bfloat16, enabled=config.precision == "bf16")
    numbers_S = torch.arange(size, device=lesson.device)
    with block.giving(top_k), watch(block.model) as routers:
        for router in routers:
            router.top_k = top_k
        policy = attach_policy("switch", routers, arguments={"coefficient": config.balance})
        for step in range(steps):
            if step % batches == 0:
                order = draw.permutation(lesson.rows)
            start = step % batches * size
            x_SD, y_SD = lesson.take(order[start : start + size])
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    step, steps=steps, peak=config.lr, warmup_steps=int(steps * WARMUP), min_ratio=FLOOR
                )
            policy.begin(Moment(config.seed, step, numbers_S, size))
            with autocast:
                squared = squared_error(block, x_SD, y_SD, energy=energy)
            (squared + policy.loss()).backward()  # type: ignore[no-untyped-call]
            value = float(squared.detach())
            if not math.isfinite(value):
                raise NumericalError(
                    "the error is not finite", where=f"recover, layer {layer}", hint="lower recover.lr"
                )
            torch.nn.utils.clip_grad_norm_(block.parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            on_step(step + 1, steps, math.sqrt(value))


def squared_error(block: Block, x_SD: torch.Tensor, y_SD: torch.Tensor, *, energy: float) -> torch.Tensor:
    """Mean ‖block(x) - y‖² over the tokens, over `energy`, the mean ‖y‖² of all text: a scalar."""
    return (block(x_SD).float() - y_SD).square().sum() / (len(x_SD) * energy)


def _energy(lesson: Lesson) -> float:
    """Σ‖y‖² over the tokens; at least tiny, for a layer that gives zero."""
    total = sum(float(lesson.take(rows)[1].double().square().sum()) for rows in lesson.pieces())
    return max(total, float(np.finfo(np.float32).tiny))


@torch.no_grad()
def measure(block: Block, lesson: Lesson, *, top_k: int) -> Measured:
    """Errors and factors of every K over the tokens of `lesson`, and where its router sends them."""
    experts = block.num_experts
    energy = _energy(lesson)
    sums = np.zeros((experts, 3))  # Σ routed·wanted, Σ routed², Σ wanted²; wanted = FFN - rest
    mass_E = torch.zeros(experts, dtype=torch.float64, device=lesson.device)
    load_E = torch.zeros(experts, dtype=torch.int64, device=lesson.device)
    for k in range(1, experts + 1):
        with block.giving(k), watch(block.model) as (router,):
            for rows in lesson.pieces():
                x_SD, y_SD = lesson.take(rows)
                routed_SD, rest_SD = (part.double() for part in block.parts(x_SD))
                wanted_SD = y_SD.double() - rest_SD
                sums[k - 1] += [
                    float((left * right).sum())
                    for left, right in ((routed_SD, wanted_SD), (routed_SD, routed_SD), (wanted_SD, wanted_SD))
                ]
                if k == top_k:
                    scores_SE = weighting(router).scores(router.logits_TE).double()
                    shares_SE = scores_SE / scores_SE.sum(dim=1, keepdim=True)
                    mass_E += shares_SE.sort(dim=1, descending=True).values.sum(dim=0)
                    load_E += torch.bincount(router.chosen_TK.flatten(), minlength=experts)
    errors, factors = [], []
    for k, (product, routed, wanted) in enumerate(sums.tolist(), start=1):
        best = product / routed if routed > 0 and product > 0 else 1.0
        factor = 1.0 if k == top_k or abs(best - 1.0) < NO_FACTOR else best
        errors.append(math.sqrt(max(wanted - 2 * factor * product + factor**2 * routed, 0.0) / energy))
        factors.append(factor)
    return Measured(
        errors=tuple(errors),
        factors=tuple(factors),
        mass=tuple((mass_E.cumsum(0) / len(lesson.rows)).tolist()),
        load=tuple((load_E.double() / load_E.sum()).tolist()),
    )
