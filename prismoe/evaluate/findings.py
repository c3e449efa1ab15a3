"""What the scores say, in sentences: what an honest table must not leave to its reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from prismoe.evaluate.compare import ALPHA, AVERAGE, TaskScore, holm, paired_p
from prismoe.evaluate.control import STATIC, Control
from prismoe.evaluate.heldout import Losses
from prismoe.evaluate.tasks import TaskResult
from prismoe.train.scoring import TextLoss

__all__ = ["find"]


def find(
    rows: Sequence[TaskScore],
    found: Mapping[str, Sequence[TaskResult]],
    texts: Losses,
    *,
    control: Control | None,
    seed: int,
) -> tuple[str, ...]:
    """Mixtures that do or do not beat their static control, and scores that guessing would reach as well."""
    sentences = []
    if control is not None and control.folder is None:
        sentences.append(f"There is no static control: {control.reason}.")
    elif control is not None:
        if found:
            sentences += _on_tasks(found, control, seed=seed)
        if texts:
            sentences += _on_text(texts, control)
    return (*sentences, *_no_better_than_guessing(rows))


def _on_tasks(found: Mapping[str, Sequence[TaskResult]], control: Control, *, seed: int) -> list[str]:
    static = found[STATIC]
    gaps = {
        name: [mine.per_document_N - theirs.per_document_N for mine, theirs in zip(found[name], static, strict=True)]
        for name in control.of
    }
    adjusted = holm([paired_p(gap, seed=seed) for gap in gaps.values()])
    where = f"on average over {len(static)} tasks" if len(static) > 1 else f"on {static[0].task}"
    sentences = []
    for (name, gap), p_value in zip(gaps.items(), adjusted, strict=True):
        mine, theirs = (sum(one.score for one in results) / len(static) for results in (found[name], static))
        better = sum(float(values.mean()) for values in gap) > 0 and p_value < ALPHA
        verb = "beats" if better else "does not beat"
        numbers = f"{100 * mine:.1f} against {100 * theirs:.1f} %, p {p_text(p_value)}"
        sentences.append(f"{name} {verb} its static control {where}: {numbers}.")
    return sentences


def _on_text(texts: Losses, control: Control) -> list[str]:
    domains = list(dict.fromkeys(domain for _, domain in texts))
    measured = {name: _difference(texts, name, domains) for name in control.of}
    adjusted = iter(holm([p for _, p in measured.values() if p is not None]))
    sentences = []
    for name, (gap, p_value) in measured.items():
        p_value = None if p_value is None else next(adjusted)
        text = f"its static control on held-out text: {gap:+.3f} nats a token, mean of {_domains(len(domains))}"
        if p_value is None:
            sentences.append(f"{name} may or may not beat {text}; a domain of one document cannot say.")
        else:
            verb = "beats" if gap < 0 and p_value < ALPHA else "does not beat"
            sentences.append(f"{name} {verb} {text}, p {p_text(p_value)}.")
    return sentences


def _domains(count: int) -> str:
    return f"{count} domain{'s' * (count > 1)}"


def _difference(texts: Losses, name: str, domains: Sequence[str]) -> tuple[float, float | None]:
    """Mean over domains of the loss less the control's, and its two-sided p (normal: a mean over many documents)."""
    pairs = [(texts[name, domain], texts[STATIC, domain]) for domain in domains]
    gaps = [TextLoss(mine.nats - theirs.nats, mine.tokens) for mine, theirs in pairs]
    mean = float(np.mean([gap.loss for gap in gaps]))
    errors = [gap.standard_error for gap in gaps if gap.standard_error is not None]
    if len(errors) < len(gaps):
        return mean, None
    error = math.hypot(*errors) / len(gaps)
    return mean, math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)


def _no_better_than_guessing(rows: Sequence[TaskScore]) -> list[str]:
    sentences = []
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name and row.task != AVERAGE and row.chance is not None]
        if guessed := [row.task for row in own if not row.above_chance]:
            which = f"{len(guessed)} of {len(own)} tasks: {', '.join(guessed)}"
            which = guessed[0] if len(own) == 1 else f"any of {len(own)} tasks" if len(guessed) == len(own) else which
            sentences.append(f"{name} is not above chance on {which}.")
    return sentences


def p_text(p_value: float) -> str:
    """Two digits, and no power of ten that a draw cannot reach."""
    return f"{p_value:.2g}" if p_value >= 1e-4 else "below 0.0001"
