"""`run`: order, what is kept, what is refused, and what a folder holds at the end."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from prismoe.config import load_config
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.reference import find_domains, reference_loss
from prismoe.run import Done, _yaml, run
from prismoe.run.stages import STAGES as ALL_STAGES
from prismoe.state import read_state
from tests.runs import config, copy_of, finished, workplace

STAGES = ("plan", "convert", "verify", "prepare", "pretrain", "eval", "trace", "report")


def hashes(folder: Path) -> dict[str, str]:
    """Of everything but what holds clocks."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "timing.jsonl")
    files = (path for path in paths if "tensorboard" not in path.parts)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_makes_every_stage_in_order() -> None:
    folder, stages = finished()
    assert tuple(done.stage for done in stages) == STAGES
    assert {done.state for done in stages} == {"made"}
    made = {path.name for path in (folder / "run").iterdir()}
    assert made == {
        "data",
        "eval",
        "figures",
        "moe",
        "plan.safetensors",
        "prismoe.json",
        "report.html",
        "run.json",
        "run.yaml",
        "scores.json",
        "trace",
        "train",
    }
    assert {path.name for path in (folder / "run" / "data").iterdir()} == {"stories", "code"}


def test_receipts_hold_numbers_that_can_be_computed_by_hand() -> None:
    receipts = {done.stage: done.receipt for done in finished()[1]}
    # 3 layers, hidden 64, FFN 96, 4 experts: each token passes 2 of 4 experts, so half of the FFN's weights.
    assert receipts["plan"]["shape"]["expert_width"] == 96 // 4
    assert receipts["plan"]["account"]["ffn_active_percent"] == 50.0
    assert receipts["plan"]["account"]["padding_parameters"] == 3 * 4 * 3 * 64 * (32 - 24)
    assert receipts["verify"]["passed"]
    assert receipts["pretrain"]["steps"] == 6
    assert sum(row["sequences"] for row in receipts["pretrain"]["mixture"]) == 6 * 4
    assert list(receipts["eval"]["models"]) == ["dense", "step 0", "trained"]


def test_the_same_command_keeps_everything(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    run(config(out=out))  # the folder's name is part of run.yaml
    before = hashes(out)
    seen: list[Done] = []
    run(config(out=out), on_stage=seen.append)
    assert [(done.stage, done.state) for done in seen] == [(name, "kept") for name in STAGES]
    assert hashes(out) == before


def test_run_yaml_describes_the_run(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    again = load_config(out / "run.yaml")
    assert again == config()
    assert yaml.safe_load((out / "run.yaml").read_text())["plan"]["num_experts"] == 4


def test_another_setting_is_refused_and_says_which(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    before = hashes(out)
    with pytest.raises(UsageError) as caught:
        run(config("plan.num_experts=2", out=out))
    assert str(caught.value) == (
        f"{out}/run.json: plan is finished with other settings (plan.num_experts was 4, is 2)"
        " (hint: --force makes it again, --out makes another run)"
    )
    with pytest.raises(UsageError, match=r"pretrain is finished with other settings \(pretrain\.steps was 6, is 8\)"):
        run(config("pretrain.steps=8", out=out))
    assert hashes(out) == before


def test_a_reference_is_what_its_file_holds(tmp_path: Path) -> None:
    """Other losses in the same file are another run; the same losses in another file are not."""
    out, file = copy_of(tmp_path), tmp_path / "reference.json"
    reference_loss(out / "moe", find_domains(out), out=file, seq_len=16, max_tokens=200)
    moving = ["pretrain.mixing=sheared", "pretrain.mixing_every_tokens=128"]
    under = config(*moving, f"pretrain.reference={file}", out=out)
    assert run(under, stages=("pretrain",), force=True).stages[0].state == "made"
    moved = file.rename(tmp_path / "moved.json")
    elsewhere = config(*moving, f"pretrain.reference={moved}", out=out)
    assert run(elsewhere, stages=("pretrain",)).stages[0].state == "kept"
    found = json.loads(moved.read_text())
    found["losses"]["code"]["loss"] += 0.5
    moved.write_text(json.dumps(found))
    with pytest.raises(UsageError, match=r"pretrain is finished with other settings \(pretrain\.reference was"):
        run(elsewhere, stages=("pretrain",))


def test_force_makes_again_only_what_changed(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    states = {done.stage: done.state for done in run(config("pretrain.steps=8", out=out), force=True).stages}
    kept = {"plan": "kept", "convert": "kept", "verify": "kept", "prepare": "kept"}
    assert states == {**kept, "pretrain": "made", "eval": "made", "trace": "made", "report": "made"}
    assert read_state(out)["pretrain"]["receipt"]["steps"] == 8


def test_a_missing_output_is_made_again_with_the_same_bytes(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    before = hashes(out / "moe")
    (out / "moe" / "manifest.json").unlink()
    states = {done.stage: done.state for done in run(config(out=out), stages=("plan", "convert")).stages}
    assert states == {"plan": "kept", "convert": "made"}
    after = hashes(out / "moe")
    assert {name: after[name] for name in before} == before


def test_a_stage_needs_the_stages_before_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run(config(out=tmp_path / "new"), stages=("verify",))
    assert (
        str(caught.value)
        == f"{tmp_path}/new: convert is not finished (hint: `prismoe convert` first, or `prismoe run`)"
    )
    out = copy_of(tmp_path)
    with pytest.raises(InputError, match="prepare was made with other settings"):
        run(config("data.heldout_fraction=0.5", out=out), stages=("eval",))


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run(config(out=tmp_path / "new"), dry_run=True)
    assert [(done.stage, done.state) for done in result.stages] == [
        ("plan", "checked"),
        ("convert", "checked"),
        ("prepare", "checked"),
    ]
    assert result.of("convert")["state"] == "dry run"
    assert not (tmp_path / "new").exists()


def test_a_plan_needs_neither_folder_nor_weights(tmp_path: Path) -> None:
    source = finished()[0] / "dense"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((source / "config.json").read_bytes())
    plan = run(load_config(overrides=["plan.num_experts=6"], source=str(tmp_path / "model")), stages=("plan",))
    assert plan.of("plan")["shape"]["expert_width"] == 96 // 6
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_bad_argument_is_told_where_it_was_written(tmp_path: Path) -> None:
    path = workplace(tmp_path)
    path.write_text(path.read_text().replace("num_experts: 4", "num_experts: 7"))
    with pytest.raises(UsageError) as caught:
        run(load_config(path), stages=("plan",))
    assert str(caught.value).startswith(
        f"{path}:4: plan.num_experts: 96 neurons less 0 shared do not divide into 7 experts"
    )


def test_sections_decide_which_stages_run(tmp_path: Path) -> None:
    source = str(finished()[0] / "dense")
    result = run(
        load_config(overrides=["plan.num_experts=4", "verify.tokens=8"], source=source, out=str(tmp_path / "a"))
    )
    assert [done.stage for done in result.stages] == ["plan", "convert", "verify", "report"]
    with pytest.raises(UsageError, match="data is not set; needed a `data:` section"):
        run(load_config(source=source, out=str(tmp_path / "b")), stages=("prepare",))
    with pytest.raises(UsageError, match="out is not set; needed --out FOLDER"):
        run(load_config(source=source), stages=("convert",))
    with pytest.raises(UsageError, match="source is not set; needed source=FOLDER"):
        run(load_config(out=str(tmp_path / "c")), stages=("plan",))


def test_other_files_in_the_folder_are_left_alone_but_strange_output_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "notes"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    run(config(out=out), stages=("plan",))
    assert (out / "notes.txt").read_text() == "mine"
    strange = tmp_path / "strange"
    (strange / "moe").mkdir(parents=True)
    (strange / "moe" / "thesis.tex").write_text("mine")
    with pytest.raises(ResourceError, match="output folder holds something else"):
        run(config(out=strange), stages=("plan", "convert"))
    assert (strange / "moe" / "thesis.tex").read_text() == "mine"


def test_a_damaged_state_is_an_input_error(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    (out / "run.json").write_text(json.dumps({"plan": {"key": "x"}}))
    with pytest.raises(InputError, match=r"run\.json: not a readable run state"):
        run(config(out=out))


def test_where_a_command_stops_is_not_kept(tmp_path: Path) -> None:
    """`--max-steps` is of one command: the run folder alone goes on to the end."""
    written = tmp_path / "run.yaml"
    written.write_bytes(_yaml(config("pretrain.max_steps=2")))
    assert load_config(written).pretrain == config().pretrain


def test_a_setting_of_a_later_version_decides_nothing_until_it_is_set() -> None:
    """compile came later: finished runs of the versions before it are still finished."""
    decided = ALL_STAGES["pretrain"].decides(config())["pretrain"]
    assert "recompute" not in decided  # it may change
    assert "precision" in decided
    assert "compile" not in decided
    assert ALL_STAGES["pretrain"].decides(config("pretrain.compile=true"))["pretrain"]["compile"] is True
