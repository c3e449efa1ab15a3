"""Construction methods against what they promise: exact covers, the paper's scale, independent streams."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from prismoe import registry
from prismoe.convert.gather import draw
from prismoe.errors import UsageError
from prismoe.layerplan import LayerView, RouterDraw
from prismoe.methods import random, upcycle
from prismoe.recipe import Fill

METHODS = ("branch", "clustering", "coactivation", "gradient", "prune", "random", "router_first", "upcycle")


def view(*, neurons: int = 96, top_k: int = 2, seed: int = 0, index: int = 0) -> LayerView:
    def weights() -> Any:
        raise AssertionError("this method needs no weights")

    return LayerView(index=index, num_neurons=neurons, hidden_size=64, top_k=top_k, seed=seed, ffn=weights)


@pytest.mark.parametrize(("experts", "shared"), [(1, 0), (8, 0), (8, 16), (96, 0), (95, 1)])
def test_random_is_a_partition(experts: int, shared: int) -> None:
    layer = random.split(view(), num_experts=experts, shared=shared)
    assert layer.experts.shape == (experts, (96 - shared) // experts)
    assert layer.shared.shape == (shared,)
    assert (np.diff(layer.experts) > 0).all()
    assert (np.diff(layer.shared) > 0).all()
    everything = np.concatenate([layer.experts.ravel(), layer.shared])
    np.testing.assert_array_equal(np.sort(everything), np.arange(96))


def test_random_scale_is_e_over_k_unless_given() -> None:
    assert random.split(view(top_k=2), num_experts=16).scale == 8.0
    assert random.split(view(top_k=4), num_experts=16).scale == 4.0


def test_random_depends_on_seed_and_layer_alone() -> None:
    first = random.split(view(), num_experts=8).experts
    np.testing.assert_array_equal(first, random.split(view(top_k=4), num_experts=8).experts)
    for other in (view(seed=1), view(index=1), view(seed=2**63 - 1)):
        assert not np.array_equal(first, random.split(other, num_experts=8).experts)


def test_random_spreads_evenly() -> None:
    """Over 400 layers every pair of neurons meets in an expert of 8 as often as chance says: 7/95, within 5 sigma."""
    together = np.zeros((96, 96))
    for index in range(400):
        for row in random.split(view(index=index), num_experts=12).experts:
            together[np.ix_(row, row)] += 1
    pairs = together[np.triu_indices(96, 1)]
    chance = 7 / 95
    sigma = np.sqrt(400 * chance * (1 - chance))
    assert pairs.mean() == pytest.approx(400 * chance)
    assert np.abs(pairs - 400 * chance).max() < 5.5 * sigma


def test_upcycle_copies_every_neuron() -> None:
    layer = upcycle.split(view(), num_experts=4)
    np.testing.assert_array_equal(layer.experts, np.tile(np.arange(96), (4, 1)))
    assert layer.shared.size == 0
    assert (layer.scale, layer.router) == (1.0, RouterDraw(std=0.02, seed=0))


def test_router_rows_are_not_drawn_from_the_permutations_numbers() -> None:
    """The two streams share key (seed, layer); their counters are 2**192 apart."""
    near = np.random.Generator(np.random.Philox(key=[3, 1])).permutation(96)
    assert not np.array_equal(near, view(seed=3, index=1).generator().permutation(96))
    rows = draw(Fill((8, 64), "F32", std=0.02, key=(3, 1)))
    again = np.random.Generator(np.random.Philox(key=[3, 1])).standard_normal((8, 64)) * 0.02
    np.testing.assert_array_equal(rows, again.astype(np.float32))


@pytest.mark.parametrize(
    ("neurons", "experts", "shared", "nearest", "hint"),
    [
        (11008, 10, 0, "nearest 8 or 16", "shared=8"),
        (172, 8, 0, "nearest 4 or 43", "shared=4"),
        (172, 8, 2, "nearest 5 or 10", "shared=4"),
        (97, 8, 0, "nearest 1 or 97", "shared=1"),
    ],
)
def test_indivisible_widths_name_the_nearest(neurons: int, experts: int, shared: int, nearest: str, hint: str) -> None:
    with pytest.raises(UsageError, match=nearest) as caught:
        random.split(view(neurons=neurons), num_experts=experts, shared=shared)
    assert hint in str(caught.value)
    random.split(view(neurons=neurons), num_experts=experts, shared=int(hint.removeprefix("shared=")))


def test_every_method_has_a_split_with_a_checkable_signature() -> None:
    assert registry.names("prismoe.methods") == METHODS
    for name in ("random", "upcycle"):
        module = registry.load("prismoe.methods", name, where="method")
        bound = registry.arguments(module.split, {}, where=name)
        assert module.split(view(), **bound).experts.shape[0] == bound["num_experts"]
        assert registry.arguments(module.split, bound, where=name) == bound


@pytest.mark.parametrize("name", ["", "os", "../plan", "random.py", "__init__", "_hidden", "random\x00"])
def test_only_names_in_the_folder_are_loaded(name: str) -> None:
    with pytest.raises(UsageError, match=f"^method: unknown .*; needed one of {', '.join(METHODS)}"):
        registry.load("prismoe.methods", name, where="method")


def test_arguments_are_strict_and_reported_together() -> None:
    def function(position: int, *, needed: int, ratio: float = 0.5, name: str = "x") -> None: ...

    assert registry.arguments(function, {"needed": 1, "ratio": 2}, where="f") == {
        "needed": 1,
        "ratio": 2.0,
        "name": "x",
    }
    with pytest.raises(UsageError) as caught:
        registry.arguments(function, {"position": 1, "ratio": "2", "nam": 1}, where="f")
    assert str(caught.value) == (
        "f: unknown argument position; there are needed, ratio, name; unknown argument nam; did you mean name?; "
        "needed is missing; ratio is '2', input should be a valid number"
    )
