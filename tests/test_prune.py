"""The static control end to end: a narrower model of the source's own architecture, that stock classes load as such."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.account import account
from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.errors import UsageError
from prismoe.plan import make_plan, plan_shape
from prismoe.verify import verify
from tests import golden
from tests.tiny import tiny_dense

ROPE = {"rope_parameters": golden.LLAMA31_ROPE, "tie_word_embeddings": True}


@pytest.mark.parametrize(("family", "settings"), [("llama", ROPE), ("mistral", {}), ("qwen2", {}), ("qwen3", {})])
def test_written_in_the_sources_own_architecture(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense", family, num_hidden_layers=2, **settings)
    plan = make_plan(dense, method="prune", keep=0.4, by="random")
    assert plan.top_k == 1
    assert plan_shape(plan).expert_width == 38
    convert(dense, plan, target="dense", out=tmp_path / "small")
    config = json.loads((tmp_path / "small/config.json").read_text())
    assert config == {**json.loads((dense / "config.json").read_text()), "intermediate_size": 64}
    certificate = verify(tmp_path / "small", source=dense, tokens=48)
    assert [layer.kind for layer in certificate.layers] == ["sharing", "sharing"]
    assert "loaded whole" in certificate.whole
    model, misfits = golden.load(tmp_path / "small")
    assert not any(misfits.values())
    # No router, so the reference needs none: one expert with gate 1.
    routers = {index: np.zeros((1, 64)) for index in range(2)}
    expected, _ = golden.compute(golden.reference(dense, plan, routers))
    found, _ = golden.compute(model)
    assert np.abs(found - expected).max() <= 2e-5


def test_the_same_plan_fits_a_mixture_of_one(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense", num_hidden_layers=1)
    plan = make_plan(dense, method="prune", by="random")
    for target in ("mixtral", "granitemoeshared"):
        convert(dense, plan, target=target, out=tmp_path / target)
        assert verify(tmp_path / target, source=dense, tokens=32).passed


def test_it_is_accounted_without_a_router(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense", num_hidden_layers=1)
    plan = make_plan(dense, method="prune", by="random")
    counted = account(Checkpoint.open(dense).family, plan_shape(plan), target="dense")
    assert counted.dense_parameters - counted.total_parameters == 3 * 64 * 48
    assert counted.total_parameters == counted.active_parameters
    assert counted.ffn_active_percent_of_dense == 50
    assert "dense" in counted.accepted_by


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"num_experts": 8}, "num_experts is 8, needs 1: it has no router"),
        ({"num_experts": 1, "top_k": 1}, "expert_width is 96, needs less than the dense FFN"),
        ({"num_experts": 1, "top_k": 1, "shared": 32}, "shared_width is 32, needs 0: it has no shared expert"),
        ({"method": "prune", "by": "random", "layers": [0]}, r"dense_layers is \[1\], needs \[\]"),
    ],
)
def test_what_it_cannot_hold(arguments: dict[str, Any], problem: str, tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense", num_hidden_layers=2)
    with pytest.raises(UsageError, match=problem):
        convert(dense, make_plan(dense, **arguments), target="dense", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
