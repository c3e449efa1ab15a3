"""How large a mixture's output will be: estimated (by enumeration here), warned of by `plan`, measured by `verify`."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.cli import main
from prismoe.convert import convert
from prismoe.layerplan import LayerPlan, RouterDraw
from prismoe.plan import Origin, Plan, make_plan
from prismoe.plan.strength import expected_strength, strength_warnings
from prismoe.verify import verify
from tests.handmade import handmade
from tests.tiny import tiny_dense


def plan_of(experts: Any, *, top_k: int, scale: float, shared: tuple[int, ...] = (), group: int = 1) -> Plan:
    layer = LayerPlan(
        experts=np.array(experts, np.int32),
        shared=np.array(shared, np.int32),
        router=RouterDraw(0.02, 0),
        scale=scale,
        group=group,
    )
    return Plan((layer,), top_k, 12, 8, Origin("random", {}, 0, ""))


@pytest.mark.parametrize("shared", [(), (10, 11), (0, 11)])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_estimate_is_the_mean_over_every_choice_of_experts(top_k: int, shared: tuple[int, ...]) -> None:
    experts, scale = [[0, 1, 2], [3, 4, 5], [5, 6, 7], [0, 8, 9]], 1.7
    squares = []
    for chosen in combinations(experts, top_k):
        strength = np.array([sum(neuron in expert for expert in chosen) for neuron in range(12)]) * scale / top_k
        strength[list(shared)] += 1
        squares.append((strength**2).mean())
    found = expected_strength(plan_of(experts, top_k=top_k, scale=scale, shared=shared))
    assert found == pytest.approx(np.mean(squares) ** 0.5)


def test_copies_are_the_dense_model_and_norm_is_what_keeps_its_size(tmp_path: Path) -> None:
    source = handmade(tmp_path / "dense")
    groups = {"num_experts": 8, "granularity": 2, "top_k": 4}
    assert expected_strength(make_plan(source, method="upcycle", num_experts=4)) == pytest.approx(1)
    assert expected_strength(make_plan(source, method="upcycle", **groups)) == pytest.approx(1)
    for top_k, paper in ((1, 8**0.5), (2, 1), (4, 8**0.5 / 8)):
        plan = make_plan(source, num_experts=8, top_k=top_k)
        assert expected_strength(plan) == pytest.approx(paper)  # √(E/K) / K
        assert bool(strength_warnings(plan)) == (top_k != 2)
        norm = make_plan(source, num_experts=8, top_k=top_k, scale="norm")
        assert expected_strength(norm) == pytest.approx(1)
        assert strength_warnings(norm) == ()
    assert strength_warnings(make_plan(source, num_experts=16, top_k=4)) == ()  # LLaMA-MoE's own: exactly a half
    assert expected_strength(make_plan(source, method="upcycle", num_experts=4, noise=0.1)) is None


def test_plan_warns_before_and_verify_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny_dense(tmp_path / "dense")
    arguments = ["plan", str(source), "plan.num_experts=8", "plan.top_k=4"]
    assert main(arguments) == 0
    assert "with scale 2 and 4 experts kept, FFN outputs are about 0.35 times the dense model's" in _line(capsys)
    assert main([*arguments, "plan.scale=norm"]) == 0
    assert "FFN outputs" not in _line(capsys)
    assert main([*arguments, "recover.tokens=1000"]) == 0  # it learns the size
    assert "FFN outputs" not in _line(capsys)
    for name, scale in (("paper", "paper"), ("norm", "norm")):
        convert(source, make_plan(source, num_experts=8, top_k=4, scale=scale), out=tmp_path / name)
        found = verify(tmp_path / name, source=source)
        mean = np.exp(np.mean([np.log(row.norm_ratio) for row in found.layers]))
        assert bool(found.warnings) == (not 0.5 <= mean <= 2) == (name == "paper")
        assert found.passed  # a choice, not a fault
        assert type(found).read(tmp_path / name) == found
    assert main(["verify", str(tmp_path / "paper"), f"source={source}"]) == 0
    assert "geometric mean of 3 layers: plan.scale=measured" in _line(capsys)


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())
