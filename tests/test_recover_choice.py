"""How `recover` chooses K, against trying everything."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.recover.choice import choose_top_k

errors = st.integers(1, 4).flatmap(
    lambda layers: st.lists(
        st.lists(st.integers(0, 9).map(lambda n: n / 8), min_size=4, max_size=4), min_size=layers, max_size=layers
    )
)


@given(errors, st.integers(4, 16).map(lambda quarters: quarters / 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_budget_is_spent_as_well_as_can_be(rows: list[list[float]], budget: float, by_layer: bool) -> None:
    chosen = choose_top_k(rows, budget=budget, by_layer=by_layer)
    choices = itertools.product(range(1, 5), repeat=len(rows)) if by_layer else ((k,) * len(rows) for k in range(1, 5))
    allowed = [ks for ks in choices if sum(ks) <= budget * len(rows)]

    def cost(ks: tuple[int, ...]) -> tuple[float, int]:
        return sum(row[k - 1] ** 2 for row, k in zip(rows, ks, strict=True)), sum(ks)

    assert chosen in allowed
    assert cost(chosen) == pytest.approx(min(map(cost, allowed)))


@given(errors, st.integers(0, 9).map(lambda n: n / 8), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_fewest_experts_within_an_error(rows: list[list[float]], limit: float, by_layer: bool) -> None:
    chosen = choose_top_k(rows, error=limit, by_layer=by_layer)
    groups = [[row] for row in rows] if by_layer else [rows]
    for group, k in zip(groups, chosen, strict=False):
        worst = [max(row[n] for row in group) for n in range(4)]
        within = [n + 1 for n in range(4) if worst[n] <= limit]
        assert k == (within[0] if within else 1 + worst.index(min(worst)))
