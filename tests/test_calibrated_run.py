"""A run whose plan looks at text: prepare, calibrate, plan, convert …, and what the plan chooses to be measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from prismoe.cli import main
from prismoe.config import Config, load_config
from prismoe.errors import InputError, UsageError
from prismoe.folder import sha256_file
from prismoe.plan import Plan
from prismoe.run import run
from prismoe.stats.calibration import Calibration
from tests.runs import config

SHORT = ("calibrate.seq_len=16", "calibrate.max_tokens=512", "pretrain=null", "eval.seq_len=16")
MADE = ("prepare", "calibrate", "plan", "convert", "verify")


def calibrated(out: Path, *overrides: str) -> Config:
    return config("plan.method=gradient", *SHORT, *overrides, out=out)


def test_a_calibrate_section_puts_text_before_the_plan(tmp_path: Path) -> None:
    out = tmp_path / "run"
    made = run(calibrated(out), stages=MADE)
    assert [(done.stage, done.state) for done in made.stages] == [(name, "made") for name in MADE]
    receipt = made.of("calibrate")
    # Nobody named them: the method looks at importance, and wants a cluster of text for each of 4 experts.
    assert (receipt["quantities"], receipt["num_clusters"]) == (["importance"], 4)
    assert (receipt["num_tokens"], receipt["settings"]["seed"]) == (16 * receipt["num_sequences"], 3)
    assert sum(map(sum, receipt["cluster_domains"])) == receipt["num_sequences"]
    found = Calibration.open(out / "calibration")
    plan = Plan.load(out / "plan.safetensors")
    assert plan.origin.calibration == sha256_file(out / "calibration" / "manifest.json")
    importance_CF = found.layer(1).need("importance")
    layer = plan.layers[1]
    assert layer is not None
    best = int(importance_CF.max(axis=0).argmax())  # nobody is asked before the largest score of all
    owner = int(importance_CF[:, best].argmax())
    assert best in layer.experts[owner]
    assert made.of("verify")["passed"]
    again = run(calibrated(out), stages=MADE)
    assert {done.state for done in again.stages} == {"kept"}


def test_what_was_chosen_is_chosen_again_from_run_yaml(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(calibrated(out), stages=("prepare",))
    written = yaml.safe_load((out / "run.yaml").read_text())
    assert not {"quantities", "clusters", "seed"} & written["calibrate"].keys()
    assert load_config(out / "run.yaml") == calibrated(out)
    other = load_config(out / "run.yaml", overrides=["plan.method=router_first"])
    assert other.calibrate is not None
    assert (other.calibrate.quantities, other.calibrate.clusters) == (("inputs", "scores"), 1)


@pytest.mark.parametrize(
    ("overrides", "quantities", "clusters"),
    [
        (["plan.method=gradient", "plan.num_experts=6"], {"importance"}, 6),
        (["plan.method=gradient"], {"importance"}, 8),  # the method's own number of experts
        (["plan.method=coactivation"], {"coactivation"}, 1),
        (["plan.method=prune", "plan.by=gradient"], {"importance"}, 1),
        (["plan.method=prune"], {"activation"}, 1),
        (["plan.router=regressed"], {"inputs"}, 1),
        (["plan.scale=measured", "plan.method=gradient", "plan.num_experts=4"], {"importance", "inputs"}, 4),
        (["calibrate.clusters=3", "plan.method=gradient"], {"importance"}, 3),
        (["calibrate.quantities=[output]", "plan.method=coactivation"], {"output"}, 1),
        ([], {"activation", "importance", "inputs", "marks", "output"}, 1),  # nothing is asked for: the default
    ],
)
def test_the_plan_says_what_is_measured(overrides: list[str], quantities: set[str], clusters: int) -> None:
    found = load_config(overrides=["calibrate.seq_len=16", *overrides]).calibrate
    assert found is not None
    assert (set(found.quantities), found.clusters) == (quantities, clusters)


def test_a_plan_waits_for_its_calibration(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"calibrate is not finished \(hint: `prismoe calibrate` first"):
        run(calibrated(out), stages=("plan",))
    assert not (out / "plan.safetensors").exists()
    with pytest.raises(UsageError, match="data is not set; needed a `data:` section"):
        run(load_config(overrides=["calibrate.seq_len=16"], source="x", out=str(out)), stages=("calibrate",))


def test_other_settings_are_refused_and_another_calibration_can_be_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(calibrated(out), stages=MADE[:3])
    with pytest.raises(UsageError, match=r"calibrate is finished with other settings \(calibrate\.importance was 'l1'"):
        run(calibrated(out, "calibrate.importance=square"), stages=MADE[:3])
    saved = run(calibrated(out, "calibrate.save_seconds=1"), stages=MADE[:3])  # how often, not what
    assert {done.state for done in saved.stages} == {"kept"}
    named = config("plan.method=gradient", f"plan.calibration={out / 'calibration'}", out=tmp_path / "other")
    run(named, stages=("plan",))
    assert (tmp_path / "other" / "plan.safetensors").read_bytes() == (out / "plan.safetensors").read_bytes()


def test_a_dry_run_checks_what_can_be_checked(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert [done.stage for done in run(calibrated(out), dry_run=True).stages] == ["prepare"]
    run(calibrated(out), stages=("prepare",))
    found = run(calibrated(out), dry_run=True)
    assert [done.stage for done in found.stages] == ["prepare", "calibrate"]
    assert found.of("calibrate")["state"] == "dry run"
    assert found.of("calibrate")["memory_bytes"] > 0
    assert not (out / "calibration").exists()


def test_a_wrong_setting_is_told_where_it_was_written(tmp_path: Path) -> None:
    run(calibrated(tmp_path), stages=("prepare",))
    with pytest.raises(UsageError, match=r"^calibrate\.clusters=500: \d+ sequences for 500 data clusters"):
        run(calibrated(tmp_path, "calibrate.clusters=500"), stages=("calibrate",))


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["calibrate.clusters=3"], "calibrate.clusters=3: 3 data clusters for 4 experts; needed at least one"),
        (
            ["calibrate.quantities=[marks]"],
            "calibrate.quantities=[marks]: without importance; needed what plan.method=",
        ),
        (["plan.method=coactivation"], "method coactivation: METIS is not installed (hint: pip install"),
    ],
)
def test_a_calibration_that_its_plan_could_not_use_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], line: str
) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    run(calibrated(tmp_path / "run"), stages=("prepare",))
    with pytest.raises(UsageError) as caught:
        run(calibrated(tmp_path / "run", *overrides), stages=("calibrate",), force=True)
    assert str(caught.value).startswith(line)
    assert not (tmp_path / "run/calibration").exists()


@pytest.mark.parametrize("plan", ["plan.router=regressed", "plan.scale=measured"])
def test_a_run_without_the_calibration_of_its_plan_says_what_to_add(tmp_path: Path, plan: str) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError) as caught:
        run(config(plan, out=out))
    assert str(caught.value).endswith("or one of this run (hint: add `calibrate: {}` to the config)")
    with pytest.raises(UsageError, match=r"`calibrate: {}` and a `data:` section to the config"):
        run(config(plan, "data=null", "pretrain=null", out=out))
    with pytest.raises(UsageError, match="needed a folder that `prismoe calibrate` made"):
        run(config(plan, out=out), stages=("plan",), dry_run=True)
    assert not out.exists()
    assert run(config(plan, "calibrate={}", out=out), dry_run=True).stages


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "plan.prompts: prompts is not set; needed a list of texts for each expert"),
        (["plan.prompts=[[once],[the king]]"], "plan.prompts=[[once],[the king]]: prompts for 2 experts; needed for 4"),
    ],
)
def test_prompts_are_counted_before_they_are_run(tmp_path: Path, overrides: list[str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(config("plan.router=prompts", *overrides, out=tmp_path / "run"), stages=("plan",))
    assert str(caught.value).startswith(line)


def test_the_verb_and_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(calibrated(tmp_path), stages=("prepare",))
    capsys.readouterr()
    assert main(["calibrate", str(tmp_path), "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert (receipt["verb"], receipt["state"], receipt["num_clusters"]) == ("calibrate", "written", 4)
    assert main(["calibrate", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    tokens = receipt["num_tokens"]
    assert f"importance on {tokens:,} tokens in 4 clusters, loss {receipt['loss']:.3f}" in lines
    rows: list[list[str]] = [line.split() for line in lines]
    counts: list[list[Any]] = receipt["cluster_domains"]
    assert all([str(cluster), *map(str, row)] in rows for cluster, row in enumerate(counts))
    assert main(["show", str(tmp_path / "calibration"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "calibration"
    assert main(["show", str(tmp_path / "calibration")]) == 0
    assert f"loss {receipt['loss']:.3f}" in capsys.readouterr().out
