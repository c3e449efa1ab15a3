"""The learning rate against the published numbers: warm-up to 2e-4 in 100 steps, half-cosine, floor 2e-5."""

import math
from itertools import pairwise

import pytest

from prismoe.train.schedule import learning_rate

LLAMA_MOE = {"steps": 13_600, "peak": 2e-4, "warmup_steps": 100, "min_ratio": 0.1}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 2e-6),
        (49, 1e-4),
        (99, 2e-4),
        (100, 2e-4),
        (13_599, 2e-5),
        # Half-way between update 100 and 13,599 the cosine is 0: the mean of peak and floor.
        ((100 + 13_599) / 2, 1.1e-4),
        # A third of the way it is 1/2: three quarters of the span above the floor.
        (100 + 13_499 / 3, 2e-5 + 0.75 * 1.8e-4),
    ],
)
def test_learning_rate_of_llama_moe(step, expected):
    assert learning_rate(step, **LLAMA_MOE) == pytest.approx(expected, rel=1e-12)


def test_it_never_rises_after_the_warm_up_nor_leaves_its_band():
    rates = [learning_rate(step, **LLAMA_MOE) for step in range(13_600)]
    assert all(later > earlier for earlier, later in pairwise(rates[:100]))
    assert all(later <= earlier for earlier, later in pairwise(rates[100:]))
    assert min(rates[100:]) == pytest.approx(2e-5)
    assert max(rates) == 2e-4


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (3, 2)])
def test_shortest_runs(steps, warmup):
    rates = [learning_rate(step, steps=steps, peak=1.0, warmup_steps=warmup, min_ratio=0.1) for step in range(steps)]
    assert all(0.1 <= rate <= 1.0 and math.isfinite(rate) for rate in rates)
