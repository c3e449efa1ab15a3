"""The assignment is the optimum: against all permutations, scipy's linear assignment, and its own prices."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.balance.assignment import Assignment, assign, equal_sizes
from prismoe.errors import NumericalError, UsageError


def paid(costs: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    return float(costs[np.arange(len(costs)), labels].sum())


def proved(costs: npt.NDArray[np.float64], found: Assignment) -> None:
    """Linear programming duality: under these prices no row has a cheaper cluster, so no exchange saves anything."""
    rows = np.arange(len(costs))
    priced = costs + found.prices
    scale = max(float(np.abs(costs).max()), 1e-300)
    assert (priced[rows, found.labels] - priced.min(axis=1)).max() <= 1e-12 * scale
    others = priced.copy()
    others[rows, found.labels] = np.inf
    np.testing.assert_allclose(found.slack, others.min(axis=1) - priced[rows, found.labels], atol=1e-12 * scale)


def test_against_every_permutation() -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        sizes = generator.multinomial(7, [1 / 3] * 3)
        costs = generator.integers(0, 6, (7, 3)) + generator.choice([0.0, 0.1], (7, 3))
        seats = np.repeat(np.arange(3), sizes)
        best = min(costs[np.arange(7), seats[list(order)]].sum() for order in permutations(range(7)))
        assert paid(costs, assign(costs, sizes).labels) == pytest.approx(best, abs=1e-12)


@st.composite
def problems(draw: st.DrawFn) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Costs of the awkward kinds: ties, equal rows, nearly equal rows, zeros, one cluster far off, any magnitude."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, clusters = draw(st.integers(1, 90)), draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["plain", "ties", "zero", "equal", "nearly", "heavy", "offset"]))
    costs = generator.standard_normal((rows, clusters))
    if kind == "ties":
        costs = generator.integers(0, 3, costs.shape).astype(np.float64)
    elif kind == "zero":
        costs = np.zeros(costs.shape)
    elif kind in ("equal", "nearly"):
        costs = costs[generator.integers(0, 1 + rows // 10, rows)]
        costs += 1e-9 * generator.standard_normal(costs.shape) * (kind == "nearly")
    elif kind == "heavy":
        costs = np.exp(8 * costs)
    elif kind == "offset":
        costs[:, 0] -= 1e5
    costs *= 10.0 ** draw(st.integers(-250, 250))
    among = clusters if draw(st.booleans()) else 1 + clusters // 3  # some clusters may be closed
    sizes = np.bincount(generator.integers(0, among, rows), minlength=clusters)
    return costs, equal_sizes(rows, clusters) if draw(st.booleans()) else sizes


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems(), st.one_of(st.none(), st.integers(0, 2**32)))
def test_against_scipy(problem: tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]], warm: int | None) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    costs, sizes = problem
    prices = None if warm is None else np.random.default_rng(warm).standard_normal(len(sizes)) * 10.0 ** (warm % 9 - 4)
    found = assign(costs, sizes, prices=prices)
    assert np.bincount(found.labels, minlength=len(sizes)).tolist() == sizes.tolist()
    seats = np.repeat(np.arange(len(sizes)), sizes)
    rows, columns = optimize.linear_sum_assignment(costs[:, seats])
    scale = float(np.abs(costs).max())
    assert abs(paid(costs, found.labels) - costs[rows, seats[columns]].sum()) <= 1e-12 * len(costs) * scale
    if len(sizes) > 1 and np.count_nonzero(sizes) > 1:
        proved(costs, found)


@pytest.mark.parametrize("kind", ["plain", "whole numbers", "few distinct rows", "one for all"])
def test_a_layer_is_proved_and_a_warm_start_changes_nothing(kind: str) -> None:
    generator = np.random.default_rng(1)
    costs = generator.standard_normal((11008, 16))
    if kind == "whole numbers":
        costs = np.round(2 * costs)
    elif kind == "few distinct rows":
        costs = costs[generator.integers(0, 40, len(costs))]
    elif kind == "one for all":
        costs[:, 3] -= 100.0
    found = assign(costs)
    assert np.bincount(found.labels).tolist() == [688] * 16
    proved(costs, found)
    again = assign(costs + 1e-3 * generator.standard_normal(costs.shape), prices=found.prices)
    back = assign(costs, prices=again.prices)
    assert paid(costs, back.labels) == pytest.approx(paid(costs, found.labels), rel=1e-12)


@pytest.mark.parametrize("lone", [True, False])
def test_rows_far_from_every_boundary_may_have_to_move(lone: bool) -> None:
    """One row too many in cluster 0, one too few in 3, while 600 rows of 1 and 2 crowd the boundary between them.

    The cheapest way is row 0, at 1. Among the rows near a boundary there is none of cluster 0 (`lone`), or only row 1,
    which would pay 10: either way those rows alone give a wrong answer, and only the check over all rows tells.
    """
    costs = np.full((1000, 4), 10.0)
    costs[:200, 0] = costs[200:500, 1] = costs[500:800, 2] = costs[800:, 3] = 0.0
    spread = 1e-3 * np.random.default_rng(0).random(600) + 1e-6
    costs[200:500, 2], costs[500:800, 1] = spread[:300], spread[300:]
    costs[0, 3] = 1.0
    if not lone:
        costs[1, 1] = 1e-9
    sizes = np.array([199, 300, 300, 201])
    found = assign(costs, sizes)
    assert paid(costs, found.labels) == pytest.approx(1.0)
    assert found.labels[0] == 3
    proved(costs, found)


def test_sizes_differ_by_one_at_most() -> None:
    assert equal_sizes(10, 4).tolist() == [3, 3, 2, 2]
    assert np.bincount(assign(np.zeros((10, 4))).labels).tolist() == [3, 3, 2, 2]


@pytest.mark.parametrize(
    ("costs", "arguments", "error", "where"),
    [
        (np.zeros(3), {}, UsageError, "costs"),
        (np.zeros((0, 2)), {}, UsageError, "costs"),
        (np.zeros((4, 2)), {"sizes": [3, 2]}, UsageError, "sizes"),
        (np.zeros((4, 2)), {"sizes": [5, -1]}, UsageError, "sizes"),
        (np.zeros((4, 2)), {"sizes": [2.0, 2.0]}, UsageError, "sizes"),
        (np.zeros((4, 2)), {"sizes": [4]}, UsageError, "sizes"),
        (np.zeros((4, 2)), {"prices": [0.0]}, UsageError, "prices"),
        (np.zeros((4, 2)), {"prices": [0.0, np.nan]}, UsageError, "prices"),
        (np.full((4, 2), np.nan), {}, NumericalError, "costs"),
        (np.array([[0.0, np.inf]]), {}, NumericalError, "costs"),
    ],
)
def test_what_does_not_fit_is_refused(costs: object, arguments: dict[str, object], error: type, where: str) -> None:
    with pytest.raises(error) as caught:
        assign(costs, **arguments)  # type: ignore[arg-type]
    assert caught.value.where == where
    assert "\n" not in str(caught.value)
