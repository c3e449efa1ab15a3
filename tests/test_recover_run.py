"""`recover` as a stage of a run and as a verb: what comes after it goes on from what it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.cli import main
from prismoe.config import load_config
from prismoe.errors import UsageError
from prismoe.folder import Manifest
from prismoe.run import run
from prismoe.state import read_state
from tests.runs import config, copy_of, finished, workplace

SETTINGS = ("recover.tokens=640", "recover.seq_len=16", "recover.batch_tokens=64", "recover.lr=5e-3")


def test_a_run_trains_what_was_recovered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copy_of(tmp_path)
    under = config(*SETTINGS, out=out)
    with pytest.raises(UsageError, match="pretrain is finished with other settings"):
        run(under)
    assert not (out / "recovered").exists()
    states = {done.stage: done.state for done in run(under, force=True).stages}
    assert [name for name, state in states.items() if state == "kept"] == ["plan", "convert", "verify", "prepare"]
    recovered = Checkpoint.open(out / "recovered")
    manifest = Manifest.read(out / "recovered")
    assert manifest is not None
    manifest.check(out / "recovered")
    assert manifest.parents["mixture"] == Checkpoint.open(out / "moe").fingerprint != recovered.fingerprint
    trained = Manifest.read(out / "train")
    assert trained is not None
    assert trained.parents["source"] == recovered.fingerprint
    state = read_state(out)
    assert {row["model"] for row in state["eval"]["receipt"]["scores"]} == {"dense", "step 0", "recovered", "trained"}
    assert state["trace"]["receipt"]["before"]["fingerprint"] == recovered.fingerprint
    assert {done.state for done in run(under).stages} == {"kept"}
    words = ["recover", str(out)]
    assert main([*words, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["layers"] == state["recover"]["receipt"]["layers"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    for layer in receipt["layers"]:
        assert f"{layer['before']:.4f}" in shown
        assert f"{layer['after']:.4f}" in shown


def test_a_dry_run_before_anything_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = workplace(tmp_path)
    assert main(["recover", str(path), "--dry-run"]) == UsageError.exit_code
    assert "recover is not set; needed a `recover:` section" in capsys.readouterr().err
    done = run(load_config(path, overrides=SETTINGS), dry_run=True)
    assert done.of("recover")["not_checked"] == ["stories", "code", "moe"]
    assert main(["recover", str(path), *SETTINGS, "--dry-run"]) == 0
    assert "not there yet: stories, code, moe" in capsys.readouterr().out


def test_wrong_values_are_told_with_their_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"recover\.train=all.*router"):
        load_config(overrides=["recover.train=all"])
    with pytest.raises(UsageError, match=r"unknown key recover\.budgets"):
        load_config(overrides=["recover.budgets=2"])
    before = (finished()[0] / "run" / "run.yaml").read_bytes()
    with pytest.raises(UsageError, match=r"recover\.budget=9: 9; needed at most 4"):
        run(config("recover.budget=9", "recover.seq_len=16", out=finished()[0] / "run"), stages=("recover",))
    assert (finished()[0] / "run" / "run.yaml").read_bytes() == before
