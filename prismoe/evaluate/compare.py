"""Benchmark scores side by side: paired tests over the same documents, chance beside every score.

Two models answered the same documents, so the difference of each document is looked at, not two means with their own
errors. The test flips the signs of these differences: were the models alike, each would be as likely to be the other
way round. Nothing is assumed of their distribution. Where every document is right or wrong this is McNemar's exact
test (a sign test of the documents that only one of the two has right), and it is computed exactly; other scores, and
averages over tasks, take `DRAWS` random flips. P values of one table are corrected together (Holm 1979), so that in 95
of 100 tables of models that do not differ nothing is called significant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.evaluate.tasks import TaskResult, mean_error

__all__ = ["ALPHA", "AVERAGE", "DRAWS", "TaskScore", "compare_tasks", "guessing_p", "holm", "paired_p", "verdict"]

ALPHA = 0.05
AVERAGE = "average"
DRAWS = 19_999  # with the table as it stands that makes 20,000: the smallest p is 5e-5

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class TaskScore:
    """One model on one benchmark task.

    `score` is the mean of `metric` over documents, `standard_error` its own, `chance` what blind guessing scores (None
    where the answer is free text). `above_chance` says whether it is significantly more than that. `change` is the
    score minus that of the first model, with the standard error of the paired difference; `p_value` is that of the
    paired test alone, `p_adjusted` after Holm's correction over the whole table, and `verdict` says "significant" or
    "not" (`ALPHA`; "" for the first model). `num_truncated` prompts were too long for the model and lost their
    beginning. The task "average" is the plain mean over the tasks above it.
    """

    model: str
    task: str
    metric: str
    score: float
    standard_error: float | None
    chance: float | None
    above_chance: bool | None
    num_fewshot: int | None
    num_documents: int
    num_truncated: int
    change: float
    change_standard_error: float | None
    p_value: float | None
    p_adjusted: float | None
    verdict: str


def compare_tasks(found: Mapping[str, Sequence[TaskResult]], *, seed: int = 0) -> tuple[TaskScore, ...]:
    """The rows of `found` (model → its tasks, the same of every model) compared with the first model's.

    Raises:
        InputError: a model was asked other questions than the first.
    """
    first = next(iter(found.values()))
    rows: list[TaskScore] = []
    guesses: list[float] = []
    for model, results in found.items():
        differences = []
        for result, base in zip(results, first, strict=True):
            asked = [(one.task, one.task_hash, one.documents_hash) for one in (result, base)]
            if asked[0] != asked[1]:
                raise InputError(f"{result.task} asked other questions than of the first model", where=model)
            differences.append(result.per_document_N - base.per_document_N)
            rows.append(_row(model, result, differences[-1], is_first=results is first, seed=seed))
            if result.chance is not None:
                guesses.append(guessing_p(result.per_document_N, result.chance))
        if len(results) > 1:
            rows.append(_average(model, rows[-len(results) :], differences, is_first=results is first, seed=seed))
    better = iter(holm(guesses))
    rows = [row if row.chance is None else replace(row, above_chance=next(better) < ALPHA) for row in rows]
    adjusted = iter(holm([row.p_value for row in rows if row.p_value is not None]))
    return tuple(row if row.p_value is None else _judged(row, next(adjusted)) for row in rows)


def _row(model: str, result: TaskResult, difference_N: Floats, *, is_first: bool, seed: int) -> TaskScore:
    return TaskScore(
        model=model,
        task=result.task,
        metric=result.metric,
        score=result.score,
        standard_error=result.standard_error,
        chance=result.chance,
        above_chance=None,
        num_fewshot=result.num_fewshot,
        num_documents=result.num_documents,
        num_truncated=result.num_truncated,
        change=float(difference_N.mean()),
        change_standard_error=mean_error(difference_N),
        p_value=None if is_first else paired_p([difference_N], seed=seed),
        p_adjusted=None,
        verdict="",
    )


def _average(
    model: str, rows: Sequence[TaskScore], differences: Sequence[Floats], *, is_first: bool, seed: int
) -> TaskScore:
    """The mean over tasks, each with the same weight whatever its number of documents, as the LLaMA-MoE paper has it.

    Tasks are independent of each other, so variances add up.
    """
    count = len(rows)
    return TaskScore(
        model=model,
        task=AVERAGE,
        metric="mean of the tasks",
        score=sum(row.score for row in rows) / count,
        standard_error=_together([row.standard_error for row in rows]),
        chance=None,
        above_chance=None,
        num_fewshot=None,
        num_documents=sum(row.num_documents for row in rows),
        num_truncated=sum(row.num_truncated for row in rows),
        change=sum(row.change for row in rows) / count,
        change_standard_error=_together([row.change_standard_error for row in rows]),
        p_value=None if is_first else paired_p(differences, seed=seed),
        p_adjusted=None,
        verdict="",
    )


def _judged(row: TaskScore, p_adjusted: float) -> TaskScore:
    return replace(row, p_adjusted=p_adjusted, verdict=verdict(p_adjusted))


def verdict(p_adjusted: float) -> str:
    """The word of the table."""
    return "significant" if p_adjusted < ALPHA else "not"


def _together(errors: Sequence[float | None]) -> float | None:
    """Standard error of the mean of independent numbers."""
    known = [error for error in errors if error is not None]
    return math.hypot(*known) / len(errors) if len(known) == len(errors) else None


def paired_p(differences: Sequence[Floats], *, seed: int = 0) -> float:
    """Two-sided p of the mean over tasks of the mean difference over documents, under random signs of all of these.

    `differences` has one array of any length for each task. Exact where there is one task whose differences are of one
    size; else from `DRAWS` draws with `seed`, counting the table itself (Phipson and Smyth 2010), so it is never 0.
    """
    sizes = [np.unique(np.abs(values[values != 0]), return_counts=True) for values in differences]
    if not any(len(values) for values, _ in sizes):
        return 1.0
    if len(differences) == 1 and len(sizes[0][0]) == 1:
        return _sign_p(int((differences[0] > 0).sum()), int(sizes[0][1][0]))
    observed = sum(float(values.mean()) for values in differences)
    rng, drawn = np.random.default_rng(seed), np.zeros(DRAWS)
    for values, (sizes_U, counts_U) in zip(differences, sizes, strict=True):
        for size, count in zip(sizes_U, counts_U, strict=True):  # as many positive ones as a coin shows heads
            drawn += (2 * rng.binomial(count, 0.5, DRAWS) - count) * (size / len(values))
    as_large = int((np.abs(drawn) >= abs(observed) * (1 - 1e-9)).sum())
    return (1 + as_large) / (1 + DRAWS)


def _sign_p(heads: int, tosses: int) -> float:
    """Two-sided p of `heads` in `tosses` of a fair coin, in whole numbers: no rounding, no underflow."""
    term = total = 1
    for k in range(min(heads, tosses - heads)):
        term = term * (tosses - k) // (k + 1)
        total += term
    return float(min(1.0, 2 * total / 2**tosses))


def guessing_p(scores_N: Floats, chance: float) -> float:
    """One-sided p of a mean this high by blind guessing.

    Scores of 0 and 1: the binomial tail, exact where every document has the same chance and conservative where they
    differ about `chance` (Hoeffding 1956). Others: the normal tail.
    """
    count, mean = len(scores_N), float(scores_N.mean())
    if np.isin(scores_N, (0.0, 1.0)).all() and 0 < chance < 1:
        right = round(mean * count)
        logs = (
            math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            + k * math.log(chance) + (count - k) * math.log1p(-chance)
            for k in range(right, count + 1)
        )  # fmt: skip
        return min(1.0, math.fsum(math.exp(value) for value in logs))
    error = mean_error(scores_N)
    return 0.5 * math.erfc((mean - chance) / error / math.sqrt(2)) if error else float(mean <= chance)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values: below α together with an error rate of the family of at most α, whatever their dependence."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
