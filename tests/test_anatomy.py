"""What a plan does with the neurons: counted by sets, summed by hand, and what `show PLAN` says and draws."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from prismoe import showplan
from prismoe.checkpoint import Checkpoint
from prismoe.cli import main
from prismoe.errors import InputError
from prismoe.plan import LayerPlan, Plan, make_plan
from prismoe.plan.anatomy import plan_anatomy
from prismoe.report.planpicture import figures, picture_bytes
from prismoe.stats.calibration import Calibration
from tests.calibration import World, make_world

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("anatomy"))


@pytest.fixture(scope="module")
def calibration(world: World, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    return world.run(tmp_path_factory.mktemp("made") / "calibration", quantities=("importance",), clusters=4)


def layers(plan: Plan) -> list[LayerPlan]:
    return [layer for layer in plan.layers if layer is not None]


def plans(world: World, calibration: Calibration) -> dict[str, Plan]:
    common: dict[str, Any] = {"num_experts": 4, "calibration": calibration}
    return {
        "random": make_plan(world.model, num_experts=4),
        "inner": make_plan(world.model, method="gradient", mode="inner", **common),
        "inter": make_plan(world.model, method="gradient", mode="inter", shared=32, **common),
        "share": make_plan(world.model, method="gradient", mode="inter", shared=32, share=True, **common),
        "upcycle": make_plan(world.model, method="upcycle", num_experts=4),
    }


def test_every_neuron_is_counted_where_it_is(world: World, calibration: Calibration) -> None:
    kinds = {}
    for name, plan in plans(world, calibration).items():
        found = plan_anatomy(plan)
        kinds[name] = found.kind
        for row, layer in zip(found.layers, layers(plan), strict=True):
            sets, shared = [set(expert.tolist()) for expert in layer.experts], set(layer.shared.tolist())
            counts = [sum(neuron in held for held in sets) for neuron in range(96)]
            assert (row.one, row.several) == (counts.count(1), sum(count > 1 for count in counts))
            assert row.nobody == sum(counts[neuron] == 0 and neuron not in shared for neuron in range(96))
            assert (row.shared, row.width) == (len(shared), len(sets[0]))
            common = [[len(one & two) / len(sets[0]) for two in sets] for one in sets]
            assert (np.eye(4).tolist() if row.overlap is None else row.overlap) == common
        assert found.covered is None
    assert kinds == {"random": "partition", "inner": "overlap", "inter": "partition", "share": "overlap"} | {
        "upcycle": "copies"
    }


def test_the_mean_of_the_layers_counts_partitions_as_identities(world: World, calibration: Calibration) -> None:
    inner, random = (plans(world, calibration)[name] for name in ("inner", "random"))
    mixed = Plan((inner.layers[0], random.layers[1], None), 2, 96, 64, inner.origin)
    found = plan_anatomy(mixed)
    first = np.array(plan_anatomy(inner).layers[0].overlap)
    np.testing.assert_allclose(found.overlap, (first + np.eye(4)) / 2, rtol=1e-12)
    assert (found.kind, [row.layer for row in found.layers]) == ("overlap", [0, 1])


def test_importance_is_what_the_sums_say(world: World, calibration: Calibration) -> None:
    for plan in plans(world, calibration).values():
        found = plan_anatomy(plan, calibration=calibration)
        for row, layer in zip(found.layers, layers(plan), strict=True):
            importance = np.asarray(calibration.layer(row.layer).need("importance"), np.float64)
            assert row.covered is not None
            for cluster, values in enumerate(importance):
                total = values.sum()
                shares = [values[expert].sum() / total for expert in layer.experts]
                np.testing.assert_allclose([line[cluster] for line in row.covered.experts], shares, rtol=1e-9)
                assert row.covered.shared[cluster] == pytest.approx(values[layer.shared].sum() / total)
                two = sorted(range(4), key=lambda expert: -shares[expert])[:2]
                active = np.union1d(np.concatenate([layer.experts[expert] for expert in two]), layer.shared)
                assert row.covered.best[cluster] == pytest.approx(values[active].sum() / total)
                assert row.covered.size[cluster] == pytest.approx(len(active) / 96)
                held = np.union1d(layer.experts.ravel(), layer.shared)
                assert row.covered.nobody[cluster] == pytest.approx(1 - values[held].sum() / total, abs=1e-9)
    inner = plan_anatomy(plans(world, calibration)["inner"], calibration=calibration)
    assert inner.covered is not None
    # Sharing-Inner takes the top neurons of a cluster: no other expert covers more of it.
    assert [int(np.argmax([line[c] for line in inner.covered.experts])) for c in range(4)] == [0, 1, 2, 3]


def test_a_calibration_of_something_else_is_refused(world: World, calibration: Calibration, tmp_path: Path) -> None:
    other = make_world(tmp_path, seed=1)
    plan = make_plan(other.model, num_experts=4)
    with pytest.raises(InputError, match="a calibration of checkpoint") as caught:
        plan_anatomy(plan, calibration=calibration)
    assert Checkpoint.open(other.model).fingerprint[:16] in str(caught.value)
    without = world.run(tmp_path / "calibration", quantities=("activation",), clusters=1)
    with pytest.raises(InputError, match="without importance"):
        plan_anatomy(make_plan(world.model, num_experts=4), calibration=without)


def test_show_says_it_and_draws_it(
    world: World, calibration: Calibration, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(calibration.folder, tmp_path / "calibration")
    made = plans(world, calibration)
    path = made["share"].save(tmp_path / "plan.safetensors")
    assert main(["show", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "4 experts" in out
    found = plan_anatomy(made["share"], calibration=calibration)
    assert found.covered is not None
    assert "best 2 " + " ".join(f"{100 * share:.1f}" for share in found.covered.best) in out
    assert f"picture: {tmp_path / 'plan.png'}" in out
    picture = (tmp_path / "plan.png").read_bytes()
    assert picture.startswith(PNG)
    assert picture == picture_bytes(found, path.with_suffix(".png"), title=_title(path))
    assert main(["show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["anatomy"] == json.loads(json.dumps(found.to_dict()))
    (tmp_path / "far" / "deep").mkdir(parents=True)
    path = made["random"].save(tmp_path / "far" / "deep" / "other.plan")
    assert main(["show", str(path), "--out", str(tmp_path / "other.svg")]) == 0
    out = capsys.readouterr().out
    assert "no two experts hold the same neuron (the matrix is the identity)" in out
    assert "no calibration beside the plan" in out
    assert ElementTree.parse(tmp_path / "other.svg").getroot().tag.endswith("svg")
    assert main(["show", str(path), f"calibration={calibration.folder}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["anatomy"]["covered"] is not None


def _title(path: Path) -> str:
    from prismoe.show import describe
    from prismoe.views import summary

    return summary("plan", describe(path))


def test_a_picture_that_cannot_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(make_plan(world.model, num_experts=4).save(tmp_path / "plan.safetensors"))
    assert main(["show", path, "--out", "plan.pdf"]) == 2
    assert "--out: 'plan.pdf'; needed a name that ends in .png or .svg" in capsys.readouterr().err
    assert main(["show", path, "--out", str(tmp_path / "no" / "a.png")]) == 4
    assert main(["show", str(world.model), "--out", str(tmp_path / "a.png")]) == 2
    assert "is not a plan file" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["show", path]) == 0
    assert "no picture: the folder is finished and stays as it is" in capsys.readouterr().out
    monkeypatch.setattr(showplan, "find_spec", lambda name: None)
    assert main(["show", path]) == 0
    assert "no picture: matplotlib is not installed: pip install 'prismoe[report]'" in capsys.readouterr().out
    assert main(["show", path, "--out", str(tmp_path / "a.png")]) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["manifest.json", "plan.safetensors"]


def test_a_page_gets_panels_where_they_say_something(world: World, calibration: Calibration) -> None:
    panels = {name: len(figures(plan_anatomy(plan))) for name, plan in plans(world, calibration).items()}
    assert panels == {"random": 0, "inner": 2, "inter": 1, "share": 2, "upcycle": 0}
    found = figures(plan_anatomy(plans(world, calibration)["share"], calibration=calibration))
    assert len(found) == len({figure.name for figure in found}) == len({figure.caption for figure in found}) == 4
