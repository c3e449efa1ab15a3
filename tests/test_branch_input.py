"""Branches that are strangers to their base, plans of other branches, wrong arguments; and branches in a run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.cli import main
from prismoe.config import load_config
from prismoe.convert import convert
from prismoe.errors import InputError, PrismoeError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import Plan, make_plan, plan_shape
from prismoe.plan.compare import compare_plans
from prismoe.run import run
from prismoe.verify import verify
from tests.handmade import handmade, weights
from tests.test_branch import branch, small
from tests.tiny import tiny_dense


def config_of(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def retype(folder: Path) -> None:
    wide = {key: array.astype(np.float32) for key, array in weights(2).items()}
    handmade(folder, tensors=wide)


def retoken(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 1}}}')


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            config_of(hidden_size=32, num_hidden_layers=4),
            "hidden_size: base 16, branch 2 32; num_layers: base 2, branch 2 4;",
        ),
        (config_of(model_type="mistral"), "family: base llama, branch 2 mistral; "),
        (config_of(rope_theta=5e5), "rope_theta: base 10000.0, branch 2 500000.0; "),
        (retype, "dtype of lm_head.weight: base BF16, branch 2 F32; dtype of model.embed_tokens.weight: base BF16, "),
        (
            retoken,
            r"tokenizers: tokenizer.json: base [0-9a-f]{12}, branch 2 [0-9a-f]{12}; needed one tokenizer \(hint: ",
        ),
    ],
)
def test_strangers_are_refused(tmp_path: Path, change: Callable[[Path], None], line: str) -> None:
    base, branches = small(tmp_path)
    change(Path(branches[1]))
    with pytest.raises(InputError, match=f"^branches of {base}: {line}"):
        make_plan(base, method="branch", branches=branches)


def test_fields_are_compared_before_there_are_weights(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    for folder in (base, *map(Path, branches)):
        (folder / "model.safetensors").unlink()
    plan = make_plan(base, method="branch", branches=branches)
    assert plan_shape(plan).num_branches == 3
    with pytest.raises(InputError, match=r"config.json without weights; needed model.safetensors"):
        convert(base, plan, out=tmp_path / "moe")
    config_of(intermediate_size=64)(Path(branches[0]))
    with pytest.raises(InputError, match="intermediate_size: base 48, branch 1 64; needed checkpoints that differ in"):
        make_plan(base, method="branch", branches=branches)


def test_what_fine_tuning_tools_rewrite_is_no_difference(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    vocab = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}
    (base / "tokenizer.json").write_text(json.dumps({"model": vocab, "padding": None}))
    new = {"model": {**vocab, "merges": [["a", "b"]], "ignore_merges": False}, "padding": {"length": 8}}
    for folder in map(Path, branches):
        (folder / "tokenizer.json").write_text(json.dumps(new, indent=1, sort_keys=True))
        config_of(use_cache=False, pad_token_id=0, eos_token_id=[2, 3])(folder)
    assert len(make_plan(base, method="branch", branches=branches).branches) == 3


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({}, "method branch: branches is missing"),
        ({"branches": []}, "method branch: branches is []"),
        ({"top_k": 4}, "top_k: 4 of 3 experts; needed at most 3"),
        ({"router": "centroid"}, "router=centroid: experts of several checkpoints; needed experts cut from one"),
        ({"rest": "median"}, "method branch: rest is 'median'"),
        ({"branches": ["x/y/z"]}, "branches: 1 branch makes 1 expert"),
        ({"branches": ["x/y/z", "x/y/z"]}, "x/y/z: no such folder; needed a checkpoint folder or a hub name"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: dict[str, Any], line: str) -> None:
    base, branches = small(tmp_path)
    given: dict[str, Any] = {"branches": branches} if arguments else {}
    with pytest.raises(PrismoeError, match=f"^{re.escape(line)}"):
        make_plan(base, method="branch", **{**given, **arguments})


def test_a_plan_of_other_branches_is_refused(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    plan = make_plan(base, method="branch", branches=branches)
    with pytest.raises(InputError, match=f"^{branches[1]}: is not branch 1 of the plan; needed fingerprint "):
        convert(base, plan, branches=[branches[1], branches[0], branches[2]], out=tmp_path / "moe")
    with pytest.raises(InputError, match=r": 2 branches; needed the plan's 3"):
        convert(base, plan, branches=branches[:2], out=tmp_path / "moe")
    with pytest.raises(UsageError, match=r"^branches: a plan of one checkpoint"):
        convert(base, make_plan(base), branches=branches, out=tmp_path / "moe")
    assert not (tmp_path / "moe").exists()
    moved = [shutil.copytree(folder, f"{folder}-moved") for folder in branches]
    convert(base, plan, branches=moved, out=tmp_path / "moe")  # the same ones, elsewhere
    assert Manifest.read(tmp_path / "moe").parents["branch 2"] == Checkpoint.open(branches[1]).fingerprint  # type: ignore[union-attr]
    handmade(Path(branches[2]), tensors=weights(9))
    with pytest.raises(InputError, match=f"^{branches[2]}: is not branch 3 of the plan"):
        verify(tmp_path / "moe", source=base)


def test_a_damaged_plan_is_refused(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    plan = make_plan(base, method="branch", branches=branches)
    layer = plan.layers[1]
    assert layer is not None
    for changes, line in (
        (
            {"layers": (plan.layers[0], replace(layer, donors=(1, 2, 4)))},
            r"layer 1: donors \[1, 2, 4\] of 4 checkpoints",
        ),
        ({"layers": (plan.layers[0], replace(layer, donors=(1, 2)))}, r"layer 1: donors \[1, 2\] of 3 experts"),
        ({"rest": (1, 7)}, r"rest \[1, 7\] of 4 checkpoints"),
        ({"rest": ()}, r"rest \[\] of 4 checkpoints"),
    ):
        path = replace(plan, **changes).save(tmp_path / "plan")
        with pytest.raises(InputError, match=f"^{path}: {line}"):
            Plan.load(path)


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command prints with --json; it must succeed."""
    assert main([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_every_verb_names_the_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_dense(tmp_path / "base", num_hidden_layers=1)
    branches = [branch(base, name, seed=seed) for seed, name in enumerate(("math", "code"))]
    chosen = ["plan.method=branch", f"plan.branches=[{', '.join(branches)}]", "plan.with_base=true"]
    out = ["--out", str(tmp_path / "run")]
    rows = [{"name": name, "fingerprint": Checkpoint.open(name).fingerprint} for name in branches]
    planned = answer(capsys, "plan", str(base), *chosen)
    assert (planned["branches"], planned["rest"], planned["warnings"]) == (rows, [0, 1, 2], [])
    assert answer(capsys, "convert", str(base), *chosen, *out)["branches"] == rows
    assert answer(capsys, "verify", str(base), *chosen, *out)["passed"]
    assert answer(capsys, "verify", str(tmp_path / "run/moe"), f"source={base}", *chosen)["passed"]
    assert answer(capsys, "show", str(tmp_path / "run/moe"))["branches"] == rows
    assert answer(capsys, "show", str(tmp_path / "run/plan.safetensors"))["branches"] == rows
    assert main(["show", str(tmp_path / "run/plan.safetensors")]) == 0
    page = capsys.readouterr().out
    assert re.search(r"branch 2 .*code \([0-9a-f]{12}\)", page)
    assert re.search("all but the experts .*mean of the base, branch 1, branch 2", page)
    assert "every expert holds every neuron, as its own checkpoint has it" in page


def test_a_run_sees_a_branch_that_was_trained_on(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    (tmp_path / "run.yaml").write_text(
        json.dumps({"source": str(base), "plan": {"method": "branch", "branches": branches, "rest": "base"}})
    )
    config = load_config(tmp_path / "run.yaml", out=str(tmp_path / "run"))
    assert config == load_config(tmp_path / "run.yaml", overrides=['plan.rest="base"'], out=str(tmp_path / "run"))
    first = run(config, stages=("plan", "convert"))
    assert [done.state for done in first.stages] == ["made", "made"]
    assert [done.state for done in run(config, stages=("plan", "convert")).stages] == ["kept", "kept"]
    handmade(Path(branches[0]), tensors=weights(9))
    with pytest.raises(UsageError, match="plan is finished with other settings"):
        run(config, stages=("plan", "convert"))
    again = run(config, stages=("plan", "convert"), force=True)
    assert [done.state for done in again.stages] == ["made", "made"]
    found = Plan.load(tmp_path / "run/plan.safetensors")
    assert found.branches[0] == Checkpoint.open(branches[0]).fingerprint
    assert found.rest == (0,)


def test_one_checkpoint_given_twice_is_told(tmp_path: Path) -> None:
    base, branches = small(tmp_path, 2)
    given = [branches[0], str(base), branches[1], branches[0]]
    config = load_config(source=str(base), overrides=["plan.method=branch", f"plan.branches={json.dumps(given)}"])
    (done,) = run(config, stages=("plan",)).stages
    assert done.receipt["warnings"] == [
        f"branch 2 ({base}) is the same checkpoint as the base",
        f"branch 4 ({branches[0]}) is the same checkpoint as branch 1",
    ]


def test_prompts_choose_among_branches(tmp_path: Path) -> None:
    """The states are the base's; prompts that look alike to it are refused, before anything is written."""
    base = tiny_dense(tmp_path / "base", num_hidden_layers=1)
    branches = [branch(base, f"b{seed}", seed=seed) for seed in (1, 2)]
    chosen = ["plan.method=branch", f"plan.branches={json.dumps(branches)}", "plan.router=prompts", "plan.top_k=1"]

    def made(prompts: list[list[str]]) -> Plan:
        config = load_config(
            source=str(base), overrides=[*chosen, f"plan.prompts={json.dumps(prompts)}"], out=str(tmp_path / "run")
        )
        run(config, stages=("plan",), force=True)
        return Plan.load(tmp_path / "run/plan.safetensors")

    with pytest.raises(UsageError, match="experts 0 and 1 have the same prompts; needed different ones"):
        made([["def add"], ["def add"]])
    with pytest.raises(UsageError, match=r"layer 0: router=prompts: all router rows coincide"):
        made([["def add"], ["def add", "def add"]])
    layer = made([["def add(first, second):"], ["the king said: no"]]).layers[0]
    assert layer is not None
    rows = np.asarray(layer.router)
    np.testing.assert_allclose(rows[0], -rows[1], atol=1e-7)
    assert np.abs(rows).max() > 0.01


def test_comparison_tells_other_checkpoints(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    plans = [make_plan(base, method="branch", branches=branches) for _ in range(2)]
    assert compare_plans(*plans).settings == {}
    handmade(Path(branches[1]), tensors=weights(9))
    other = make_plan(base, method="branch", branches=branches)
    assert list(compare_plans(plans[0], other).settings) == ["checkpoints"]
