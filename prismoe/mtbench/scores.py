"""Ratings out of judgments, and their means by category and turn. Plain Python."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from prismoe.mtbench.requests import JudgeRequest

__all__ = ["NO_RATING", "CategoryScore", "category_scores", "rating"]

NO_RATING = -1.0
_PATTERNS = (re.compile(r"\[\[(\d+\.?\d*)\]\]"), re.compile(r"\[(\d+\.?\d*)\]"))


def rating(judgment: str) -> float:
    """The first number in double brackets, else in single ones, else `NO_RATING`: as FastChat reads them."""
    for pattern in _PATTERNS:
        if match := pattern.search(judgment):
            return float(match[1])
    return NO_RATING


@dataclass(frozen=True)
class CategoryScore:
    """Means of the ratings of one category (or of "all"), by turn and over both, None where there are none.

    `judged` have a rating; `no_rating` are judgments without one, and `failed` requests without a judgment: neither
    counts into a mean. `standard_error` of `mean`, over questions.
    """

    category: str
    turn_1: float | None
    turn_2: float | None
    mean: float | None
    standard_error: float | None
    judged: int
    no_rating: int
    failed: int


def category_scores(
    requests: Sequence[JudgeRequest], judgments: Mapping[tuple[int, int], Mapping[str, Any]]
) -> list[CategoryScore]:
    """The score of each category, in the order of the questions, and of all together.

    `judgments` by (question, turn), each with its `score`.
    """
    names = list(dict.fromkeys(one.category for one in requests))
    found = [_score(name, [one for one in requests if one.category == name], judgments) for name in names]
    return [*found, _score("all", requests, judgments)]


def _score(
    name: str, requests: Sequence[JudgeRequest], judgments: Mapping[tuple[int, int], Mapping[str, Any]]
) -> CategoryScore:
    scores = {
        (one.question_id, one.turn): float(judgments[one.question_id, one.turn]["score"])
        for one in requests
        if (one.question_id, one.turn) in judgments
    }
    rated = {place: score for place, score in scores.items() if score != NO_RATING}
    by_question: dict[int, list[float]] = {}
    for (question, _), score in rated.items():
        by_question.setdefault(question, []).append(score)
    each = [fmean(values) for values in by_question.values()]
    return CategoryScore(
        category=name,
        turn_1=_mean(score for (_, turn), score in rated.items() if turn == 1),
        turn_2=_mean(score for (_, turn), score in rated.items() if turn == 2),
        mean=_mean(rated.values()),
        standard_error=stdev(each) / len(each) ** 0.5 if len(each) > 1 else None,
        judged=len(rated),
        no_rating=len(scores) - len(rated),
        failed=len(requests) - len(scores),
    )


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return fmean(found) if found else None
