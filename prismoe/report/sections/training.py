"""Training: losses, learning rate, gradients and speed, step by step. A run that is not finished shows what it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from prismoe.console import count_text
from prismoe.report.page import Block, Figure, Findings, Panel, Section, Text
from prismoe.report.style import COLOURS, legend_above, log_axis, look, thinned
from prismoe.views import summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PLACE", "section"]

PLACE = 30
Lines = Sequence[Mapping[str, Any]]


def section(found: Findings) -> Section | None:
    """Of the log of the stage `pretrain`."""
    steps, evals = found.events("step"), found.events("eval")
    if not steps or not evals:
        return None
    blocks: list[Block] = []
    if "pretrain" in found.receipts:
        receipt = found.receipts["pretrain"]
        blocks.append(Text(summary("pretrain", receipt) + "."))
        blocks += [Text(f"Warning: {text}.", look="bad") for text in receipt["warnings"]]
    else:
        blocks.append(Text(f"Not finished: {len(steps)} steps so far.", look="bad"))
    if skipped := found.events("skipped"):
        blocks.append(Text(f"{len(skipped)} steps were left out because of what their gradients were.", look="bad"))
    span = f"from step {steps[0]['step']} to {steps[-1]['step']}"
    loss = f"Training loss {span}: {steps[0]['loss']:.2f} at first, {steps[-1]['loss']:.2f} at last"
    blocks.append(
        Figure("training_loss", "Training loss (language modelling only)", [Panel(partial(_loss, steps=steps), loss)])
    )
    if taught := [row for row in steps if "teacher_loss" in row]:
        first, last = (row["teacher_loss"] for row in (taught[0], taught[-1]))
        shows = f"Distance to the teacher: {first:.3g} at first, {last:.3g} at last"
        panel = Panel(partial(_loss, steps=taught, key="teacher_loss", unit="KL (nats per token)"), shows)
        blocks.append(
            Figure("teacher_loss", "Distance to the teacher (KL over the next word, at its temperature)", [panel])
        )
    if len(names := list(evals[0]["heldout"])) > 1:
        panel = Panel(partial(_by_domain, steps=steps, names=names), f"Training loss by domain {span}", height=3.4)
        blocks.append(Figure("training_loss_by_domain", "Training loss by domain, mean of neighbouring steps", [panel]))
    ends = ", ".join(f"{name} {row['loss']:.2f}" for name, row in evals[-1]["heldout"].items())
    panel = Panel(partial(_heldout, evals=evals), f"Held-out loss at step {evals[-1]['step']}: {ends}", height=3.4)
    about = "Nats per token; the band is one standard error over documents."
    blocks.append(Figure("heldout_loss", "Held-out loss by domain", [panel], about))
    rates = [row["lr"] for row in steps]
    shows = f"Learning rate, {max(rates):.1e} at most, {rates[-1]:.1e} at the end"
    blocks.append(Figure("learning_rate", "Learning rate", [Panel(partial(_rate, steps=steps), shows, height=2.4)]))
    norms = [row["gradient_norm"] for row in steps]
    panel = Panel(partial(_norms, steps=steps), f"Gradient norm, {min(norms):.2g} to {max(norms):.2g}", height=2.4)
    blocks.append(Figure("gradient_norm", "Gradient norm before clipping", [panel]))
    if len(found.timing) > 1:
        speeds = [row["tokens_per_second_device"] for row in found.timing]
        shows = f"Speed, {count_text(sorted(speeds)[len(speeds) // 2])} tokens a second in the middle"
        panel = Panel(partial(_speed, timing=found.timing), shows, height=2.4)
        about = "Tokens per second of one device; the rest of the time goes into evaluation and saving."
        blocks.append(Figure("speed", "Speed of training", [panel], about))
    return Section("training", "Training", blocks)


def _loss(axes: Axes, *, steps: Lines, key: str = "loss", unit: str = "loss (nats per token)") -> None:
    import numpy as np

    numbers, losses = ([row[name] for row in steps] for name in ("step", key))
    x, mean, low, high = thinned(numbers, losses)
    if len(x) == len(losses):
        axes.plot(x, mean, color=COLOURS[5], linewidth=0.8, label="a step")
    else:
        axes.fill_between(x, low, high, color=COLOURS[5], alpha=0.5, linewidth=0, label="lowest to highest")
    window = max(1, len(x) // 25)
    smooth = np.convolve(mean, np.ones(window) / window, mode="valid")
    width = round(window * len(losses) / len(x))
    axes.plot(
        x[window - 1 :], smooth, color=COLOURS[0], linewidth=1.8, label=f"mean of {width} step{'s' * (width > 1)}"
    )
    axes.set(xlabel="step", ylabel=unit)
    axes.legend()


def _by_domain(axes: Axes, *, steps: Lines, names: Sequence[str]) -> None:
    for index, name in enumerate(names):
        points = [(row["step"], row["by_domain"][name]) for row in steps if name in row["by_domain"]]
        if not points:
            continue
        x, mean, _, _ = thinned(*zip(*points, strict=True), most=16)
        axes.plot(x, mean, label=name, markersize=4, linewidth=1.3, **look(index))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    legend_above(axes)


def _heldout(axes: Axes, *, evals: Lines) -> None:
    import numpy as np

    numbers = [row["step"] for row in evals]
    for index, name in enumerate(evals[0]["heldout"]):
        losses = np.array([row["heldout"][name]["loss"] for row in evals])
        errors = np.array([row["heldout"][name]["standard_error"] or 0.0 for row in evals])
        axes.plot(numbers, losses, label=name, markersize=4.5, linewidth=1.5, **look(index))
        axes.fill_between(
            numbers, losses - errors, losses + errors, color=look(index)["color"], alpha=0.12, linewidth=0
        )
    axes.set(xlabel="step", ylabel="held-out loss (nats per token)")
    legend_above(axes)


def _rate(axes: Axes, *, steps: Lines) -> None:
    x, mean, _, _ = thinned([row["step"] for row in steps], [row["lr"] for row in steps])
    axes.plot(x, mean, color=COLOURS[0], linewidth=1.6)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=False)
    axes.set(xlabel="step", ylabel="learning rate", ylim=(0, None))


def _norms(axes: Axes, *, steps: Lines) -> None:
    for index, (key, label) in enumerate((("gradient_norm", "all weights"), ("router_gradient_norm", "routers"))):
        points = [(row["step"], row[key]) for row in steps if row.get(key, 0) > 0]
        if points:
            x, mean, _, _ = thinned(*zip(*points, strict=True))
            axes.plot(x, mean, color=COLOURS[index], linewidth=1.2, linestyle=("-", "--")[index], label=label)
    axes.set(xlabel="step", ylabel="norm")
    log_axis(axes)
    legend_above(axes)


def _speed(axes: Axes, *, timing: Lines) -> None:
    x, mean, low, high = thinned([row["step"] for row in timing], [row["tokens_per_second_device"] for row in timing])
    axes.fill_between(x, low, high, color=COLOURS[5], alpha=0.5, linewidth=0)
    axes.plot(x, mean, color=COLOURS[0], linewidth=1.2)
    axes.set(xlabel="step", ylabel="tokens / s", ylim=(0, None))
