"""The static control: the dense parent with each FFN pruned to as many neurons as the mixture has active.

Whatever a mixture claims at some active size, this is what the same size gives with no routing at all. Training-free
constructions have been measured to lose against it, which no table shows that leaves it out. It is made on the way that
every mixture takes: method `prune`, target `dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.data.shards import Domain
from prismoe.errors import ResourceError, UsageError
from prismoe.plan import Plan, make_plan, plan_shape
from prismoe.progress import Progress, quiet
from prismoe.stats.calibration import Calibration

__all__ = ["STATIC", "Control", "static_control"]

STATIC = "static"
TOKENS = 32_768
"""Training text that importance is measured on where the run has no calibration."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class Control:
    """Receipt of `static_control`: its folder, or None and the `reason` why there can be none.

    `active_neurons` of the dense model's `dense_neurons` were kept in each layer, the most important ones: `by`
    activation (√mean(h²)·‖down column‖), gradient (|h·∂ℒ/∂h|), or random where there was nothing to measure on.
    `measured_on` says what text. `of` are the models that it is the control of.
    """

    folder: str | None
    reason: str
    by: str
    measured_on: str
    active_neurons: int
    dense_neurons: int
    of: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def static_control(
    source: str | Path | Checkpoint,
    plan: Plan,
    *,
    out: str | Path,
    of: Iterable[str],
    target: str = "mixtral",
    calibration: str | Path | None = None,
    domains: Iterable[Domain | str | Path] = (),
    seed: int = 0,
    offline: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Control:
    """Prune `source` to the active size of `plan`, into `out`/static. What is there already is not made again.

    Args:
        source: the dense checkpoint that the plan was made for.
        of: names of the mixtures of this plan.
        target: the mixture's own architecture: it holds the control where some layers stay dense.
        calibration: its importance is used where it measured one.
        domains: prepared domains; without a calibration, `TOKENS` tokens of their training text are measured.
        dry_run: say what would be made, write nothing.

    Raises:
        InputError: a damaged checkpoint, calibration or domain.
        NumericalError: weights or statistics that are not finite.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    checkpoint, shape, out = Checkpoint.open(source, offline=offline), plan_shape(plan), Path(out)
    active, dense = shape.top_k * shape.expert_width + shape.shared_width, plan.num_neurons
    texts = list(domains)
    by, measured_on, calibration = _importance(calibration, texts)

    def control(folder: Path | None, reason: str = "") -> Control:
        return Control(None if folder is None else str(folder), reason, by, measured_on, active, dense, tuple(of))

    if active >= dense:
        words = f"{active} neurons are active in each layer and the dense FFN has {dense}"
        return control(None, f"{words}: the dense parent itself is the control")
    if dry_run:
        return control(out / STATIC)
    layers = shape.moe_layers if shape.dense_layers else "all"
    try:
        if by != "random" and calibration is None:
            calibration = _measure(checkpoint, texts, out=out / "calibration", seed=seed, on_progress=on_progress)
        pruned = make_plan(
            checkpoint,
            method="prune",
            layers=layers,
            seed=seed,
            calibration=calibration,
            keep=(active + 0.5) / dense,  # half a neuron more: no rounding takes one away
            by=by,
        )
        _again(
            lambda force: convert(
                checkpoint,
                pruned,
                target="dense" if layers == "all" else target,
                out=out / STATIC,
                force=force,
                on_progress=on_progress,
            )
        )
    except (UsageError, ResourceError) as error:
        return control(None, str(error))
    return control(out / STATIC)


def _importance(calibration: str | Path | None, texts: list[Domain | str | Path]) -> tuple[str, str, str | Path | None]:
    """What neurons are ranked by, where that is measured, and the calibration that has it already."""
    if calibration is not None:
        measured = Calibration.open(calibration).quantities
        for quantity, by in (("activation", "activation"), ("importance", "gradient")):
            if quantity in measured:
                return by, "the run's calibration", calibration
    if texts:
        return "activation", f"{TOKENS:,} tokens of training text", None
    return "random", "nothing, there is no text", None


def _measure(
    checkpoint: Checkpoint, texts: list[Domain | str | Path], *, out: Path, seed: int, on_progress: Progress
) -> Path:
    from prismoe.calibrate import CalibrateConfig, calibrate

    settings = CalibrateConfig(quantities=("activation",), max_tokens=TOKENS, seed=seed)
    _again(lambda force: calibrate(checkpoint, settings, domains=texts, out=out, force=force, on_progress=on_progress))
    return out


def _again(make: Callable[[bool], Made]) -> Made:
    """A control of another plan or text that lies there is made anew: it is ours, and made from what is there."""
    try:
        return make(False)
    except ResourceError:
        return make(True)
