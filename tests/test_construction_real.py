"""Every method, router and scale on a real model and real text: planned, converted, proved by the certificate."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.data.prepare import DomainSource, prepare
from prismoe.errors import InputError
from prismoe.layerplan import every_neuron_once
from prismoe.layerplan.planned import activations, expert_outputs
from prismoe.plan import Plan, make_plan
from prismoe.stats.calibration import Calibration
from prismoe.verify import verify
from tests.tiny import tiny_dense

QUANTITIES = ("activation", "importance", "marks", "coactivation", "inputs", "scores", "output")


@dataclass(frozen=True)
class World:
    """A real dense model with a calibration on real stories and code. 172 neurons a layer, cut in four."""

    model: Path
    calibration: Path

    def plan(self, **arguments: Any) -> Plan:
        settings = {"top_k": 2, "calibration": self.calibration, **arguments}
        return make_plan(self.model, **settings)


@pytest.fixture(scope="module")
def world(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("real")
    model = shared / "models/stories260K"
    texts = {name: next((shared / "corpora" / name).glob("*train*")) for name in ("tinystories", "github")}
    domains = {name: DomainSource(train=(str(path),), heldout=()) for name, path in texts.items()}
    prepare(domains, tokenizer=model, out=folder / "data")
    config = CalibrateConfig(
        quantities=QUANTITIES, clusters=4, seq_len=128, max_tokens=16_384, sample_tokens=2048, device="cpu", threads=1
    )
    calibrate(model, config, domains=[folder / "data" / name for name in texts], out=folder / "calibration")
    return World(model, folder / "calibration")


METHODS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "clustering": {"method": "clustering"},
    "coactivation": {"method": "coactivation"},
    "independent": {"method": "gradient"},
    "inner": {"method": "gradient", "mode": "inner"},
    "inter": {"method": "gradient", "mode": "inter", "shared": 44},
    "inter shared": {"method": "gradient", "mode": "inter", "shared": 44, "share": True},
    "router first": {"method": "router_first", "shared": 44},
    "prune": {"method": "prune"},
    "prune gradient": {"method": "prune", "by": "gradient"},
    "drop": {"method": "upcycle", "drop": 0.5},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_planned_and_certified(world: World, name: str, tmp_path: Path) -> None:
    arguments = METHODS[name]
    if name == "coactivation":
        pytest.importorskip("pymetis")
    several = {} if arguments["method"] == "prune" else {"num_experts": 4}
    plan = world.plan(**arguments, **several)
    assert plan.to_bytes() == world.plan(**arguments, **several).to_bytes()
    partition = name in ("random", "clustering", "coactivation", "independent", "inter", "router first")
    assert all(every_neuron_once(layer, num_neurons=172) == partition for layer in plan.layers if layer is not None)
    target = "granitemoeshared" if arguments.get("shared") else "dense" if not several else "mixtral"
    convert(world.model, plan, target=target, out=tmp_path / "moe")
    assert verify(tmp_path / "moe", source=world.model, tokens=96).passed


@pytest.mark.parametrize("router", ["random", "centroid", "regressed"])
def test_measured_scales_keep_the_norm_on_other_text(world: World, router: str, tmp_path: Path) -> None:
    """The certificate measures on its own text, with the stock class, after the earlier layers of the dense model."""
    plan = world.plan(num_experts=4, router=router, scale="measured")
    convert(world.model, plan, out=tmp_path / "moe")
    ratios = [layer.norm_ratio for layer in verify(tmp_path / "moe", source=world.model, tokens=96).layers]
    assert all(0.8 < ratio < 1.25 for ratio in ratios)


def test_a_regressed_router_finds_more_of_the_output_than_chance(world: World) -> None:
    """Share of the experts' output norm that the kept two of four hold; half is chance, all layers together."""
    plan, source = world.plan(method="clustering", num_experts=4, router="regressed"), Checkpoint.open(world.model)
    found = []
    for index, layer in enumerate(plan.layers):
        assert layer is not None
        x_SD = np.array(Calibration.open(world.calibration).layer(index).inputs)
        ffn = source.ffn(index)
        outputs = expert_outputs(activations(x_SD, ffn), layer, ffn, what="test")
        norms_SE = np.stack([np.linalg.norm(out, axis=1) for out in outputs], axis=1)
        kept = np.argsort(-(x_SD @ np.asarray(layer.router).T), axis=1)[:, :2]
        found.append(np.take_along_axis(norms_SE, kept, axis=1).sum() / norms_SE.sum())
    assert np.mean(found) > 0.55


def test_a_calibration_of_another_checkpoint_is_refused(world: World, tmp_path: Path) -> None:
    other = tiny_dense(tmp_path / "other")
    with pytest.raises(InputError) as caught:
        make_plan(other, method="gradient", num_experts=4, calibration=world.calibration)
    mine, its = Checkpoint.open(other).fingerprint, Checkpoint.open(world.model).fingerprint
    assert str(caught.value) == (
        f"{world.calibration}: a calibration of another checkpoint ({its[:12]}…); needed one of {other} ({mine[:12]}…) "
        "(hint: run prismoe calibrate on it)"
    )


def test_the_plan_names_its_calibration(world: World, tmp_path: Path) -> None:
    plan = world.plan(method="gradient", num_experts=4)
    assert len(plan.origin.calibration) == 64
    assert Plan.load(plan.save(tmp_path / "plan.safetensors")).origin == plan.origin
    assert make_plan(world.model, num_experts=4).origin.calibration == ""
