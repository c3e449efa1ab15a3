"""Router rows: what each initialisation promises, on any split, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from prismoe import registry
from prismoe.errors import InputError, UsageError
from prismoe.layerplan import LayerPlan, LayerView, RouterDraw, layer_problem
from prismoe.methods import random, router_first, upcycle
from prismoe.plan import Plan, make_plan
from prismoe.routerinit import Router
from tests.handmade import handmade
from tests.views import HIDDEN, full_statistics, random_ffn, statistics, view


def applied(layer: LayerView, plan: LayerPlan, name: str, **arguments: Any) -> LayerPlan:
    chosen = Router.choose(name, arguments, known=())
    assert chosen.others == {}
    made = chosen.apply(layer, plan)
    assert layer_problem(made, num_neurons=layer.num_neurons, hidden_size=layer.hidden_size) == ""
    return made


def test_there_are_the_named_ones() -> None:
    names = ("centroid", "prompts", "random", "regressed", "stored", "zero")
    assert registry.names("prismoe.routerinit") == names


def test_random_and_zero_are_drawn_when_needed() -> None:
    layer = view(seed=5)
    plan = random.split(layer)
    assert applied(layer, plan, "random", router_std=0.3).router == RouterDraw(0.3, 5)
    assert applied(layer, plan, "auto").router == RouterDraw(0.02, 5)
    assert applied(layer, plan, "zero").router == RouterDraw(0.0, 5)


def test_the_methods_own_rows_stay_unless_told_otherwise() -> None:
    layer = view(stats=full_statistics(24))
    plan = router_first.split(layer, num_experts=4)
    assert applied(layer, plan, "auto").router is plan.router
    assert applied(layer, plan, "random").router == RouterDraw(0.02, 0)
    with pytest.raises(UsageError, match="router_std: the method makes its own router rows"):
        applied(layer, plan, "auto", router_std=0.1)


def test_centroids_point_where_an_experts_neurons_do() -> None:
    """Gate rows near three directions: each centroid prefers its own; lengths of rows do not count."""
    ffn = random_ffn(24)
    labels = np.repeat([0, 1, 2], 8)
    noise = 0.05 * np.random.default_rng(0).standard_normal((24, HIDDEN))
    ffn.gate_FD[:] = (np.eye(3, HIDDEN)[labels] + noise) * np.linspace(0.1, 9, 24)[:, None]
    layer = view(24, ffn=ffn)
    plan = replace(random.split(layer, num_experts=3), experts=np.arange(24, dtype=np.int32).reshape(3, 8))
    rows = applied(layer, plan, "centroid").router
    assert isinstance(rows, np.ndarray)
    assert (ffn.gate_FD @ rows.T).argmax(axis=1).tolist() == labels.tolist()
    assert np.sqrt((rows**2).mean()) == pytest.approx(0.02, rel=1e-5)
    assert np.abs(rows.sum(axis=0)).max() < 1e-6  # what all share is gone
    ups = applied(layer, plan, "centroid", router_matrix="up").router
    assert not np.array_equal(ups, rows)


def test_regressed_finds_the_expert_that_answers_loudest() -> None:
    """Each expert's neurons listen to one direction; inputs have that direction or not."""
    ffn = random_ffn(24)
    labels = np.repeat([0, 1, 2], 8)
    draw = np.random.default_rng(0)
    ffn.gate_FD[:] = 3 * np.eye(3, HIDDEN)[labels] + 0.1 * draw.standard_normal((24, HIDDEN))
    ffn.up_FD[:] = np.eye(3, HIDDEN)[labels] * draw.choice([-1, 1], 24)[:, None]
    loud = draw.integers(0, 3, 512)
    x = (np.eye(3, HIDDEN)[loud] * 2 + 0.1 * draw.standard_normal((512, HIDDEN))).astype(np.float32)
    layer = view(24, ffn=ffn, stats=statistics(24, inputs=x[:256]))
    plan = replace(random.split(layer, num_experts=3), experts=np.arange(24, dtype=np.int32).reshape(3, 8))
    rows = applied(layer, plan, "regressed").router
    assert isinstance(rows, np.ndarray)
    assert (x[256:] @ rows.T).argmax(axis=1).tolist() == loud[256:].tolist()


def test_regressed_solves_the_ridge_equations() -> None:
    ffn, x = random_ffn(24), np.random.default_rng(3).standard_normal((200, HIDDEN)).astype(np.float32)
    layer = view(24, ffn=ffn, stats=statistics(24, inputs=x))
    plan = random.split(layer, num_experts=4)
    z = x.astype(np.float64) @ ffn.gate_FD.T
    h = z / (1 + np.exp(-z)) * (x.astype(np.float64) @ ffn.up_FD.T)
    norms = np.stack([np.linalg.norm(h[:, ids] @ ffn.down_DF[:, ids].T, axis=1) for ids in plan.experts], axis=1)
    target = np.log(norms) - np.log(norms).mean(axis=1, keepdims=True)
    penalty = np.sqrt(0.5 * (x.astype(np.float64) ** 2).sum() / HIDDEN)
    left = np.vstack([x, penalty * np.eye(HIDDEN)])  # ridge as least squares on more rows
    wanted = np.linalg.lstsq(left, np.vstack([target, np.zeros((HIDDEN, 4))]), rcond=None)[0].T
    found = applied(layer, plan, "regressed", ridge=0.5).router
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_from_a_file_and_from_another_plan(tmp_path: Path) -> None:
    layer = view(24, index=1)
    rows = np.random.default_rng(0).standard_normal((8, HIDDEN)).astype(np.float32)
    save_file({"layers.1.router": rows}, tmp_path / "rows.safetensors")
    found = applied(layer, random.split(layer), f"from:{tmp_path / 'rows.safetensors'}")
    np.testing.assert_array_equal(found.router, rows)  # type: ignore[arg-type]
    source = handmade(tmp_path / "dense")
    first = make_plan(source, num_experts=4, router="centroid")
    path = first.save(tmp_path / "plan.safetensors")
    second = make_plan(source, num_experts=4, seed=1, router=f"from:{path}")
    for one, other in zip(first.layers, second.layers, strict=True):
        assert one is not None
        assert other is not None
        np.testing.assert_array_equal(one.router, other.router)  # type: ignore[arg-type]
    assert Plan.load(second.save(tmp_path / "second.safetensors")).origin.arguments["router"] == f"from:{path}"


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({}, "layers.1.router: no such tensor; needed F32 [8, 16]"),
        ({"layers.1.router": np.zeros((4, 16), np.float32)}, "layers.1.router: F32 [4, 16]; needed F32 [8, 16]"),
        (
            {"layers.1.router": np.full((8, 16), np.nan, np.float32)},
            "layers.1.router: holds numbers that are not finite",
        ),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, tensors: dict[str, Any], problem: str) -> None:
    save_file({"other": np.zeros(1, np.float32), **tensors}, tmp_path / "rows.safetensors")
    layer = view(24, index=1)
    with pytest.raises(InputError) as caught:
        applied(layer, random.split(layer), f"from:{tmp_path / 'rows.safetensors'}")
    assert str(caught.value) == f"{tmp_path / 'rows.safetensors'}: {problem}"


def test_prompts_become_rows(tmp_path: Path) -> None:
    states = np.random.default_rng(0).standard_normal((4, HIDDEN)).astype(np.float32) + 5
    save_file({"layers.0.inputs": states}, tmp_path / "states.safetensors")
    layer = view(24, top_k=2)
    plan = upcycle.split(layer, num_experts=4)
    rows = applied(layer, plan, "prompts", prompt_states=str(tmp_path / "states.safetensors")).router
    assert isinstance(rows, np.ndarray)
    assert (states @ rows.T).argmax(axis=1).tolist() == [0, 1, 2, 3]
    grouped = upcycle.split(layer, num_experts=8, granularity=2)
    tied = applied(layer, grouped, "prompts", prompt_states=str(tmp_path / "states.safetensors")).router
    np.testing.assert_array_equal(tied, np.repeat(rows, 2, axis=0))


@pytest.mark.parametrize("name", ["centroid", "regressed", "prompts"])
def test_rows_that_coincide_are_refused(tmp_path: Path, name: str) -> None:
    layer = view(24, stats=full_statistics(24))
    save_file({"layers.0.inputs": np.ones((4, HIDDEN), np.float32)}, tmp_path / "states.safetensors")
    arguments = {"prompt_states": str(tmp_path / "states.safetensors")} if name == "prompts" else {}
    with pytest.raises(UsageError, match=f"layer 0: router={name}: all router rows coincide"):
        applied(layer, upcycle.split(layer, num_experts=4), name, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("centroids", {}, "router: unknown 'centroids'; needed one of .*hint: did you mean centroid"),
        ("random", {"router_std": -1}, "router random: router_std is -1"),
        ("prompts", {}, "router prompts: prompt_states is missing"),
        ("../plan", {}, "router: unknown"),
    ],
)
def test_wrong_choices_are_told(name: str, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError, match=line):
        Router.choose(name, arguments, known=())
