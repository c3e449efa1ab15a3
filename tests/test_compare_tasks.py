"""The paired test against enumeration, an independent library and simulation; the words of the table."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binom, binomtest, false_discovery_control

from prismoe.errors import InputError
from prismoe.evaluate.compare import AVERAGE, compare_tasks, guessing_p, holm, paired_p
from prismoe.evaluate.tasks import TaskResult


def result(task: str, scores: list[float], *, chance: float | None = None, documents: str = "same") -> TaskResult:
    values = np.array(scores, np.float64)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return TaskResult(
        task=task,
        metric="acc",
        score=float(values.mean()),
        standard_error=error,
        chance=chance,
        num_fewshot=0,
        num_documents=len(values),
        num_requests=len(values),
        num_truncated=0,
        limit=None,
        seed=0,
        harness="0",
        task_hash="t",
        documents_hash=documents,
        note="",
        per_document_N=values,
    )


@pytest.mark.parametrize(("better", "worse", "same"), [(9, 2, 30), (2, 9, 0), (5, 5, 4), (1, 0, 0), (700, 500, 9)])
def test_right_or_wrong_is_mcnemars_exact_test(better: int, worse: int, same: int) -> None:
    differences = np.repeat([1.0, -1.0, 0.0], [better, worse, same])
    expected = binomtest(better, better + worse).pvalue
    assert paired_p([differences]) == pytest.approx(expected, rel=1e-12)


def test_other_scores_and_averages_agree_with_every_flip_there_is() -> None:
    rng = np.random.default_rng(3)
    tasks = [rng.normal(0.4, 1, 9), rng.choice([-1.0, 0.0, 1.0], 7, p=[0.1, 0.4, 0.5])]
    for differences in (tasks[:1], tasks):
        observed = abs(sum(values.mean() for values in differences))
        flat = np.concatenate([values / len(values) for values in differences])
        signs = np.array(list(itertools.product([1, -1], repeat=len(flat))))
        exact = (np.abs(signs @ flat) >= observed - 1e-12).mean()
        found = paired_p(differences, seed=1)
        assert abs(found - exact) < 4 * math.sqrt(exact * (1 - exact) / 20_000)  # four standard errors of the draws
        assert paired_p(differences, seed=1) == found


def test_models_that_do_not_differ_are_rarely_called_different() -> None:
    rng = np.random.default_rng(0)
    calls = []
    for _ in range(400):
        ability = rng.uniform(0.2, 0.9, 80)
        one, two = (rng.random((2, 80)) < ability).astype(np.float64)
        calls.append(paired_p([one - two]) < 0.05)
    assert np.mean(calls) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)
    assert paired_p([np.zeros(5)]) == 1.0


def test_holm_is_the_step_down_of_bonferroni() -> None:
    given = [0.01, 0.04, 0.03, 0.005, 0.6]
    # By hand: 5 x 0.005, 4 x 0.01, 3 x 0.03, then 2 x 0.04 is less than what came before it, and 0.6.
    assert holm(given) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.6])
    assert holm([]) == []
    assert all(mine >= fdr for mine, fdr in zip(holm(given), false_discovery_control(given), strict=True))


def test_guessing_is_the_binomial_tail() -> None:
    for right, count, chance in [(30, 100, 0.25), (100, 100, 0.25), (0, 10, 0.5), (3000, 10_000, 0.25)]:
        scores = np.repeat([1.0, 0.0], [right, count - right])
        assert guessing_p(scores, chance) == pytest.approx(binom.sf(right - 1, count, chance), rel=1e-9)
    shares = np.random.default_rng(0).uniform(0, 1, 300)
    z = (shares.mean() - 0.45) / (shares.std(ddof=1) / math.sqrt(300))
    assert guessing_p(shares, 0.45) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)))


def test_rows_beside_the_first_model() -> None:
    draw = np.random.default_rng(1)
    right = (draw.random(400) < 0.6).astype(float)
    worse = np.where(draw.random(400) < 0.3, 0.0, right)
    dense = [result("one", list(right), chance=0.25), result("two", [1.0, 0.0, 1.0, 1.0], chance=0.5)]
    other = [result("one", list(worse), chance=0.25), result("two", [1.0, 0.0, 0.0, 1.0], chance=0.5)]
    rows = {(row.model, row.task): row for row in compare_tasks({"dense": dense, "moe": other})}
    first, row, mean = rows["dense", "one"], rows["moe", "one"], rows["moe", AVERAGE]
    assert (first.change, first.p_value, first.verdict, first.above_chance) == (0.0, None, "", True)
    assert row.change == pytest.approx(worse.mean() - right.mean())
    assert row.change_standard_error == pytest.approx(np.std(worse - right, ddof=1) / 20)
    assert row.change_standard_error < math.hypot(row.standard_error, first.standard_error)
    assert row.verdict == "significant"
    assert (rows["moe", "two"].verdict, rows["moe", "two"].p_value) == ("not", 1.0)
    assert rows["moe", "two"].above_chance is False
    # Three tests were made: the smallest p counts three times.
    assert row.p_adjusted == pytest.approx(min(1, 3 * row.p_value))
    assert mean.score == pytest.approx((row.score + 0.5) / 2)
    assert mean.change_standard_error == pytest.approx(
        math.hypot(row.change_standard_error, rows["moe", "two"].change_standard_error) / 2
    )


def test_the_average_is_the_papers() -> None:
    """LLaMA-MoE, table of the main results: 11 tasks, each with the same weight. Each score is rounded to a tenth."""
    published = {
        "2/16": ([84.2, 77.5, 63.6, 60.2, 40.9, 70.8, 30.6, 71.9, 66.6, 17.0, 26.8], 55.5),
        "4/16": ([87.6, 77.9, 65.5, 65.6, 44.2, 73.3, 29.7, 75.0, 69.5, 20.3, 26.8], 57.7),
        "2/8": ([88.4, 77.6, 66.7, 65.3, 43.1, 73.3, 29.6, 73.9, 69.4, 19.8, 27.0], 57.6),
    }
    found = {
        name: [result(str(index), [score - 3, score + 3]) for index, score in enumerate(scores)]
        for name, (scores, _) in published.items()
    }
    rows = [row for row in compare_tasks(found) if row.task == AVERAGE]
    assert [row.score for row in rows] == [pytest.approx(mean, abs=0.07) for _, mean in published.values()]
    # Two documents 3 off their mean each: an error of 3 a task, independent of the others.
    assert [row.standard_error for row in rows] == [pytest.approx(3 / math.sqrt(11))] * 3
    single = {
        name: [result(str(index), [score]) for index, score in enumerate(scores)]
        for name, (scores, _) in published.items()
    }
    assert {row.standard_error for row in compare_tasks(single)} == {None}


def test_other_questions_are_not_compared() -> None:
    with pytest.raises(InputError, match="moe: one asked other questions than of the first model"):
        compare_tasks({"dense": [result("one", [1.0])], "moe": [result("one", [1.0], documents="others")]})
