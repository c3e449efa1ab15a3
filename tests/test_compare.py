"""Plans side by side: the pairing of experts by enumeration, and the words of the command line."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from prismoe.cli import main
from prismoe.errors import UsageError
from prismoe.plan import Plan, make_plan
from prismoe.plan.compare import compare_plans
from tests.handmade import handmade, weights


def plans(folder: Path) -> tuple[Plan, Plan]:
    source = handmade(folder / "dense")
    return make_plan(source, num_experts=4), make_plan(source, num_experts=4, seed=1, router="centroid", scale="norm")


def test_a_plan_agrees_with_itself_in_any_order_of_experts(tmp_path: Path) -> None:
    plan, _ = plans(tmp_path)
    found = compare_plans(plan, plan)
    assert (found.same, found.same_source, found.settings) == (1.0, True, {})
    assert {layer.router for layer in found.layers} == {"equal"}
    (layer, _) = plan.layers
    assert layer is not None
    layer.experts[:] = layer.experts[[2, 0, 3, 1]].copy()
    again = compare_plans(plan, plans(tmp_path)[0])
    assert again.same == 1.0


def test_experts_are_paired_as_well_as_they_can_be(tmp_path: Path) -> None:
    one, two = plans(tmp_path)
    found = compare_plans(one, two)
    for layer, a, b in zip(found.layers, one.layers, two.layers, strict=True):
        assert a is not None
        assert b is not None
        best = max(
            sum(len(np.intersect1d(a.experts[i], b.experts[j])) for i, j in enumerate(order))
            for order in permutations(range(4))
        )
        assert layer.same == best / 48
        assert layer.chance == 0.25
        assert layer.scales == (2.0, pytest.approx(8**0.5))
        assert (layer.shared, layer.router) == (None, "differs")
    assert found.settings == {
        "seed": (0, 1),
        "router": ("auto", "centroid"),
        "router_matrix": (None, "gate"),
        "scale": ("auto", "norm"),
    }


def test_what_cannot_be_paired_is_left_out(tmp_path: Path) -> None:
    source = handmade(tmp_path / "dense")
    one = make_plan(source, num_experts=4, shared=8, layers=[0])
    two = make_plan(source, num_experts=8, shared=16)
    found = compare_plans(one, two)
    assert found.same is None
    assert found.layers[0].shared == len(np.intersect1d(*(p.layers[0].shared for p in (one, two)))) / len(  # type: ignore[union-attr]
        np.union1d(*(p.layers[0].shared for p in (one, two)))  # type: ignore[union-attr]
    )
    assert found.layers[1].scales == (None, 4.0)
    fewer = {name: data for name, data in weights().items() if "layers.1." not in name}
    other = make_plan(handmade(tmp_path / "other", num_hidden_layers=1, tensors=fewer))
    with pytest.raises(UsageError, match="needed plans of one model"):
        compare_plans(one, other)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(plan.save(tmp_path / f"{n}.safetensors")) for n, plan in enumerate(plans(tmp_path))]
    assert main(["plan", "--compare", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plans"] == paths
    assert found["settings"]["seed"] == [0, 1]
    assert main(["plan", "--compare", *paths]) == 0
    text = capsys.readouterr().out
    assert "same place" in text
    assert "centroid" in text
    assert main(["convert", "--compare", *paths]) == 2
    assert main(["plan", "--compare", paths[0], str(tmp_path / "none")]) == 3
