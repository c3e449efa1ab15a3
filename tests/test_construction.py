"""Methods that look at weights and statistics: the worked examples of the papers' code, and what must always hold."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.errors import NumericalError, UsageError
from prismoe.layerplan import LayerPlan, every_neuron_once, layer_problem
from prismoe.layerplan.wanted import greedy, most_wanted
from prismoe.methods import clustering, coactivation, gradient, prune, random, router_first, upcycle
from tests.views import HIDDEN, full_statistics, random_ffn, statistics, view


def importance(*rows: list[float]) -> Any:
    found = np.array(rows, np.float32)
    return statistics(found.shape[1], importance=found, cluster_tokens=np.ones(len(rows), np.int64))


def test_greedy_maximum_as_published() -> None:
    """v0 = [.9,.8,.1,.2], v1 = [.85,.95,.3,.05], size 2 gives labels [0,1,1,0]."""
    stats = importance([0.9, 0.8, 0.1, 0.2], [0.85, 0.95, 0.3, 0.05])
    plan = gradient.split(view(4, stats=stats), num_experts=2)
    assert plan.experts.tolist() == [[0, 3], [1, 2]]


def test_inner_sharing_as_published() -> None:
    stats = importance([0.9, 0.8, 0.1, 0.2], [0.85, 0.95, 0.3, 0.05])
    plan = gradient.split(view(4, stats=stats), num_experts=2, mode="inner")
    assert plan.experts.tolist() == [[0, 1], [0, 1]]
    wide = gradient.split(view(4, stats=stats), num_experts=2, mode="inner", width=3)
    assert wide.experts.tolist() == [[0, 1, 3], [0, 1, 2]]


@pytest.mark.parametrize(("share", "routed"), [(False, [[0, 5], [3, 4]]), (True, [[0, 3], [3, 4]])])
def test_inter_sharing_as_published(share: bool, routed: list[list[int]]) -> None:
    """v0 = [6,5,4,3,2,1], v1 = [1,6,5,4,3,2], one shared expert and two routed ones of 2 neurons."""
    stats = importance([6, 5, 4, 3, 2, 1], [1, 6, 5, 4, 3, 2])
    plan = gradient.split(view(6, stats=stats), num_experts=2, mode="inter", shared=2, share=share)
    assert plan.shared.tolist() == [1, 2]
    assert plan.experts.tolist() == routed


def test_of_equal_scores_the_higher_expert_goes_first() -> None:
    assert greedy(np.ones((2, 4)), np.arange(4, dtype=np.int32), 2).tolist() == [[2, 3], [0, 1]]


def test_votes_are_counted_again_after_every_move() -> None:
    """Three experts with top 1: two name neuron 0; it moves, and then two name neuron 2, so 1 (one vote) stays."""
    scores = np.array([[9.0, 1, 8, 0], [9, 1, 8, 0], [0, 9, 2, 1]])
    assert most_wanted(scores, width=1, count=2).tolist() == [0, 2]
    assert most_wanted(np.eye(3), width=1, count=2).tolist() == [
        0,
        1,
    ]  # of equal votes in index order, no more than asked


def brute_force(scores: Any, width: int) -> list[list[int]]:
    """The definition: again and again the largest score of a free neuron for an expert that is not full."""
    held: list[list[int]] = [[] for _ in scores]
    free = set(range(scores.shape[1]))
    while free:
        open_pairs = [(scores[e, n], e, -n) for e in range(len(scores)) if len(held[e]) < width for n in free]
        _, expert, neuron = max(open_pairs)
        held[expert].append(-neuron)
        free.remove(-neuron)
    return [sorted(row) for row in held]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_greedy_is_the_definition(experts: int, width: int, seed: int) -> None:
    scores = np.random.default_rng(seed).integers(0, 4, (experts, experts * width)).astype(np.float32)  # many ties
    assert greedy(scores, np.arange(experts * width, dtype=np.int32), width).tolist() == brute_force(scores, width)


def planted(neurons: int, experts: int) -> tuple[Any, np.ndarray]:
    """An FFN whose up rows point, at any length, near one of `experts` directions; and which."""
    draw = np.random.default_rng(5)
    labels = draw.permutation(np.repeat(np.arange(experts), neurons // experts))
    ffn = random_ffn(neurons)
    rows = np.eye(experts, HIDDEN)[labels] + 0.05 * draw.standard_normal((neurons, HIDDEN))
    ffn.up_FD[:] = rows * np.exp(draw.normal(0, 2, (neurons, 1)))
    return ffn, labels


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_clustering_finds_planted_directions(metric: Any) -> None:
    ffn, labels = planted(48, 4)
    plan = clustering.split(view(48, ffn=ffn), num_experts=4, metric=metric)
    assert sorted(map(tuple, plan.experts)) == sorted(tuple(np.flatnonzero(labels == e)) for e in range(4))
    other = clustering.split(view(48, ffn=ffn), num_experts=4, matrix="gate")
    assert not np.array_equal(other.experts, plan.experts)


def test_coactivation_finds_planted_groups() -> None:
    pytest.importorskip("pymetis")
    labels = np.random.default_rng(2).permutation(np.repeat(np.arange(4), 12))
    counts = np.where(labels[:, None] == labels, 50, 1).astype(np.int32)
    plan = coactivation.split(view(48, stats=statistics(48, coactivation=counts)), num_experts=4)
    assert sorted(map(tuple, plan.experts)) == sorted(tuple(np.flatnonzero(labels == e)) for e in range(4))


def test_coactivation_makes_unequal_groups_equal() -> None:
    """14 + 10 neurons that belong together: the parts are equal, and the smaller group stays whole."""
    pytest.importorskip("pymetis")
    labels = np.repeat([0, 1], [14, 10])
    counts = np.where(labels[:, None] == labels, 50, 0).astype(np.int32)
    plan = coactivation.split(view(24, stats=statistics(24, coactivation=counts)), num_experts=2)
    assert any(set(range(14, 24)) <= set(row) for row in plan.experts.tolist())


def test_without_metis_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    with pytest.raises(UsageError) as caught:
        coactivation.split(view(24, stats=full_statistics(24)), num_experts=4)
    line = "method coactivation: METIS is not installed (hint: pip install 'prismoe[metis]')"
    assert str(caught.value) == line


def test_router_first_follows_its_router() -> None:
    """Two kinds of tokens; each half of the neurons matters to one. The expert that a kind prefers gets its half."""
    draw = np.random.default_rng(0)
    kinds = np.repeat([0, 1], 32)
    x = np.where(kinds[:, None] == 0, 1.0, -1.0) * np.ones(HIDDEN) + 0.1 * draw.standard_normal((64, HIDDEN))
    half = draw.permutation(24)[:12]
    scores = np.full((64, 24), 0.1)
    scores[np.ix_(kinds == 0, half)] = 1.0
    scores[np.ix_(kinds == 1, np.setdiff1d(np.arange(24), half))] = 1.0
    stats = statistics(24, inputs=x.astype(np.float32), scores=scores.astype(np.float32))
    plan = router_first.split(view(24, stats=stats), num_experts=2)
    assert isinstance(plan.router, np.ndarray)
    chosen = (x @ plan.router.T).argmax(axis=1)
    assert len(set(chosen[kinds == 0])) == len(set(chosen[kinds == 1])) == 1
    assert plan.experts[chosen[0]].tolist() == sorted(half.tolist())
    assert np.sqrt((plan.router**2).mean()) == pytest.approx(0.02, rel=1e-5)


def test_prune_keeps_what_matters() -> None:
    stats = statistics(
        8,
        mean_square=np.arange(8, dtype=np.float32) ** 2,
        importance=np.array([[9, 0, 0, 0, 0, 0, 0, 1], [0, 2, 0, 0, 0, 0, 0, 1]], np.float32),
        cluster_tokens=np.array([1, 10]),
    )
    ffn = random_ffn(8)
    ffn.down_DF[:] = 1.0
    ffn.down_DF[:, 1] = 100.0  # seldom on, but then it shows
    layer = view(8, stats=stats, ffn=ffn)
    assert prune.split(layer, keep=0.26).experts.tolist() == [[1, 7]]
    # Over all text: neuron 1 has 2·10, neuron 7 has 1 + 10, neuron 0 has 9.
    assert prune.split(layer, keep=0.25, by="gradient").experts.tolist() == [[1, 7]]
    assert prune.split(layer, keep=0.5, by="random").experts.shape == (1, 4)
    with pytest.raises(UsageError, match=r"keep: 0\.1 of 8 neurons"):
        prune.split(layer, keep=0.1)


METHODS: dict[str, tuple[Any, list[dict[str, Any]], bool]] = {
    "random": (random.split, [{}, {"shared": 8}], True),
    "clustering": (clustering.split, [{}, {"metric": "cosine"}, {"matrix": "gate"}], True),
    "coactivation": (coactivation.split, [{}, {"edges": 3}], True),
    "independent": (gradient.split, [{}], True),
    "inner": (gradient.split, [{"mode": "inner"}, {"mode": "inner", "width": 11}], False),
    "inter": (gradient.split, [{"mode": "inter", "shared": 8}], True),
    "inter shared": (gradient.split, [{"mode": "inter", "shared": 8, "share": True}], False),
    "router first": (router_first.split, [{}, {"shared": 8}], True),
}


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=15, deadline=None)
@given(experts=st.sampled_from([1, 2, 4]), width=st.integers(2, 6), seed=st.integers(0, 2**63 - 1))
def test_what_every_split_promises(name: str, experts: int, width: int, seed: int) -> None:
    """Valid ascending indices of one size, a partition where it says so, and the same again under the same seed."""
    if name == "coactivation":
        pytest.importorskip("pymetis")
    split, variants, partition = METHODS[name]
    for arguments in variants:
        neurons = experts * width + arguments.get("shared", 0)
        if arguments.get("width", 0) > neurons:
            continue
        stats = full_statistics(neurons, clusters=experts + 1, seed=seed % 1000)
        layer = view(neurons, top_k=1, seed=seed, stats=stats)
        plan = split(layer, num_experts=experts, **arguments)
        assert layer_problem(plan, num_neurons=neurons, hidden_size=HIDDEN) == ""
        assert plan.experts.dtype == plan.shared.dtype == np.int32
        assert plan.experts.shape == (experts, arguments.get("width", width))
        assert plan.shared.shape == (arguments.get("shared", 0),)
        assert plan.scale == experts
        assert not np.intersect1d(plan.experts, plan.shared).size
        assert not partition or every_neuron_once(plan, num_neurons=neurons)
        again = split(view(neurons, top_k=1, seed=seed, stats=stats), num_experts=experts, **arguments)
        np.testing.assert_array_equal(plan.experts, again.experts)
        np.testing.assert_array_equal(plan.shared, again.shared)


def refused(split: Any, *, stats: Any = None, **arguments: Any) -> str:
    with pytest.raises((UsageError, NumericalError)) as caught:
        split(view(24, stats=stats), num_experts=4, **arguments)
    return str(caught.value)


def test_bad_input_is_one_line() -> None:
    needs = "calibration: needs statistics of the neurons; needed a folder that `prismoe calibrate` made"
    assert refused(gradient.split) == needs
    three = importance(*np.ones((3, 24)).tolist())
    assert refused(gradient.split, stats=three) == (
        "num_experts: 3 data clusters for 4 experts; needed at least one data cluster for each expert "
        "(hint: calibrate with clusters=4)"
    )
    broken = importance(*np.full((4, 24), np.nan).tolist())
    assert refused(gradient.split, stats=broken) == "layer 0: importance is not finite (hint: calibrate again in fp32)"
    assert refused(gradient.split, stats=broken, shared=4) == (
        "shared: 4 with mode=independent; needed more than 0 with mode=inter, else 0"
    )
    assert "width: 3 with mode=independent" in refused(gradient.split, stats=broken, width=3)
    assert "width: 25; needed at most 24 neurons" in refused(gradient.split, stats=broken, mode="inner", width=25)
    assert "calibration has no scores" in refused(router_first.split, stats=statistics(24, inputs=np.ones((9, HIDDEN))))
    few = statistics(24, inputs=np.ones((3, HIDDEN), np.float32), scores=np.ones((3, 24)))
    assert refused(router_first.split, stats=few) == "calibration: 3 sampled tokens; needed at least 4"
    # Every input is the same: all centroids coincide, and one expert would get everything.
    same = statistics(24, inputs=np.ones((9, HIDDEN), np.float32), scores=np.ones((9, 24)))
    assert "layer 0: router_first: expert 1 gets none of 9 sampled tokens" in refused(router_first.split, stats=same)
    ffn = random_ffn(24)
    ffn.up_FD[3, 3] = np.inf
    with pytest.raises(NumericalError, match="layer 0: up_proj is not finite"):
        clustering.split(view(24, ffn=ffn), num_experts=4)
    with pytest.raises(UsageError, match="do not divide into 7 experts"):
        clustering.split(view(24), num_experts=7)


def test_a_neuron_of_zeros_does_not_stop_clustering() -> None:
    ffn = random_ffn(24)
    ffn.up_FD[3] = 0
    for metric in ("l2", "cosine"):
        plan = clustering.split(view(24, ffn=ffn), num_experts=4, metric=metric)  # type: ignore[arg-type]
        assert every_neuron_once(plan, num_neurons=24)


@pytest.mark.parametrize("permute", [False, True])
@pytest.mark.parametrize(("granularity", "shared"), [(1, 0), (4, 0), (2, 8), (1, 8)])
def test_virtual_groups_hold_every_routed_neuron_once(granularity: int, shared: int, permute: bool) -> None:
    plan = upcycle.split(
        view(24, top_k=granularity), num_experts=8, granularity=granularity, shared=shared, permute=permute
    )
    assert layer_problem(plan, num_neurons=24, hidden_size=HIDDEN) == ""
    rest = np.setdiff1d(np.arange(24), plan.shared)
    groups = plan.experts.reshape(8 // granularity, -1)
    for group in groups:
        np.testing.assert_array_equal(np.sort(group), rest)
    assert plan.group == plan.scale == granularity
    differ = any(not np.array_equal(a, b) for a, b in itertools.pairwise(groups))
    assert differ == (permute and granularity > 1)
    assert (plan.shared.tolist() == list(range(shared))) or permute


def test_drop_takes_moments_of_what_goes() -> None:
    ffn = random_ffn(24)
    one = upcycle.split(view(24, ffn=ffn), num_experts=3, drop=0.5).redraw
    three = upcycle.split(view(24, ffn=ffn), num_experts=3, drop=0.5, drop_sets="per_matrix").redraw
    assert one is not None
    assert three is not None
    assert one.slots.shape == (1, 3, 12)
    assert three.slots.shape == (3, 3, 12)
    for found in (one, three):
        for expert in range(3):
            for number, weights in enumerate((ffn.gate_FD, ffn.up_FD, ffn.down_DF.T)):
                gone = weights[found.slots[number % len(found.slots), expert]].astype(np.float64)
                assert found.moments[expert, number] == pytest.approx([gone.mean(), gone.std()], rel=1e-5, abs=1e-6)
    sets = three.slots.reshape(9, 12)
    assert len({tuple(row) for row in sets}) == 9  # a set of its own for each matrix of each expert
    assert upcycle.split(view(24), drop=0.01).redraw is None  # less than one neuron


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"granularity": 3}, "granularity: 3; needed a divisor of 8 experts"),
        ({"granularity": 4}, "top_k: 2; needed a multiple of granularity 4"),
        (
            {"granularity": 2, "shared": 3},
            "granularity: 21 routed neurons; needed a multiple of 2 (hint: change shared)",
        ),
        ({"shared": 24}, "granularity: 0 routed neurons; needed a multiple of 1 (hint: change shared)"),
    ],
)
def test_upcycling_that_does_not_divide(arguments: dict[str, int], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        upcycle.split(view(24), num_experts=8, **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == line


def test_factors_of_a_spread() -> None:
    """S = E·G²/T of the paper is 4 for E8G8T8 with gates before top-k; √4 on up and down, ∛4 on all three."""

    def factors(spread: Any) -> list[float]:
        empty = np.empty(0, np.int32)
        plan = LayerPlan(np.zeros((1, 1), np.int32), empty, np.zeros((1, 1), np.float32), scale=4.0, spread=spread)
        return list(plan.factors.values())

    assert factors("down") == [1.0, 1.0, 4.0]
    assert factors("sqrt") == [1.0, 2.0, 2.0]
    assert factors("cube_root") == pytest.approx([4 ** (1 / 3)] * 3)
