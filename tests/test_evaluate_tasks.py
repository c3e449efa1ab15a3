"""Benchmarks inside a run: the receipt, the static control, what is kept, what is refused first, decontamination."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.cli import main
from prismoe.config import load_config
from prismoe.errors import InputError, UsageError
from prismoe.evaluate import benchmarks, evaluate, static_control
from prismoe.evaluate.tasks import score_tasks, score_wanted
from prismoe.plan import Plan, make_plan
from prismoe.run import run
from tests.benchmarkrows import write_files
from tests.runs import copy_of, finished, workplace

QUESTION = "why does the old king carry a red umbrella into every one of his seven gardens at night"
ITEMS = [
    {"goal": f"play in the park {number}", "sol1": "with a ball", "sol2": "with two numbers", "label": number % 2}
    for number in range(12)
]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Benchmark files of one task."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    items = [*ITEMS, {"goal": QUESTION, "sol1": "yes", "sol2": "no", "label": 0}]
    (folder / "piqa_valid.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def asked(files: Path, out: Path, *overrides: str) -> Any:
    given = ["eval.tasks=piqa", f"eval.files={files}", *overrides]
    return load_config(finished()[0] / "config.yaml", overrides=given, out=str(out))


def test_one_call_measures_text_and_tasks_of_every_model(tmp_path: Path, files: Path) -> None:
    out = copy_of(tmp_path)
    config = asked(files, out, f"eval.models.again={finished()[0] / 'dense'}")
    receipt = run(config, stages=("eval",)).of("eval")
    names = ["dense", "step 0", "trained", "again", "static"]
    assert [row["model"] for row in receipt["tasks"]] == names == list(receipt["models"])
    assert {row["model"] for row in receipt["scores"]} == set(names)
    assert json.loads((out / "scores.json").read_text()) == receipt
    rows = {row["model"]: row for row in receipt["tasks"]}
    (direct,) = score_tasks(finished()[0] / "dense", tasks=["piqa"], files=files, seed=3)
    assert (rows["dense"]["score"], rows["dense"]["chance"]) == (direct.score, 0.5)
    # The same model under another name: no document differs.
    assert (rows["again"]["change"], rows["again"]["p_value"], rows["again"]["verdict"]) == (0.0, 1.0, "not")
    assert receipt["benchmarks"]["piqa"]["documents_hash"] == direct.documents_hash
    assert receipt["seed"] == 3
    # 2 of 4 experts of 24 neurons: 48 of 96 are active, and as many the control keeps.
    control = receipt["control"]
    assert (control["active_neurons"], control["dense_neurons"], control["by"]) == (48, 96, "activation")
    assert json.loads((Path(control["folder"]) / "config.json").read_text())["intermediate_size"] == 64  # 48 padded
    assert control["of"] == ["step 0", "trained"]
    assert any(text.startswith("step 0 does not beat its static control on piqa") for text in receipt["findings"])
    assert any(text.startswith("dense is not above chance on piqa") for text in receipt["findings"])
    assert [text for text in receipt["warnings"] if "never searched for piqa_valid.jsonl" in text]
    before = (out / "scores.json").read_bytes()
    shutil.rmtree(out / "eval")  # nothing kept, everything computed again
    (out / "scores.json").unlink()
    run(config, stages=("eval",))
    assert (out / "scores.json").read_bytes() == before


def test_a_stopped_evaluation_goes_on_after_what_is_finished(
    tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness is cut off at its second model; then only that one is asked."""
    dense, moe = finished()[0] / "dense", finished()[0] / "run" / "moe"
    seen: list[str] = []

    def until_the_mixture(folder: Path, wanted: Any, **options: Any) -> Any:
        seen.append(Path(folder).name)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return score_wanted(folder, wanted, **options)

    monkeypatch.setattr(benchmarks, "score_wanted", until_the_mixture)
    options: dict[str, Any] = {"tasks": ["piqa"], "files": files, "limit": 6, "keep": tmp_path / "kept"}
    with pytest.raises(KeyboardInterrupt):
        evaluate({"dense": dense, "moe": moe}, [], **options)
    resumed = evaluate({"dense": dense, "moe": moe}, [], **options)
    assert seen == ["dense", "moe", "moe"]
    assert resumed.to_dict() == evaluate({"dense": dense, "moe": moe}, [], **{**options, "keep": None}).to_dict()
    assert resumed.on("moe", "piqa").num_documents == 6
    for kept in (tmp_path / "kept").iterdir():
        kept.write_text("{")  # damaged: computed again
    assert evaluate({"dense": dense, "moe": moe}, [], **options).to_dict() == resumed.to_dict()
    assert len(seen) == 7


def test_a_killed_evaluation_and_the_same_command_again_write_the_same_bytes(tmp_path: Path, files: Path) -> None:
    folder, out = finished()[0], tmp_path / "out"
    write_files(files)
    command = ["eval", str(folder / "dense"), f"eval.models.mixture={folder / 'run/moe'}", "eval.control=none"]
    command += ["eval.tasks=piqa,mmlu:1,boolq:2", f"eval.files={files}", "--out", str(out), "--offline"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "prismoe", *command], stdout=log, stderr=log)
        while not (kept := [*out.glob("eval/*.json")]) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (out / "scores.json").exists()
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before  # not computed again
    resumed = (out / "scores.json").read_bytes()
    shutil.rmtree(out)
    assert main(command) == 0
    assert (out / "scores.json").read_bytes() == resumed


def test_the_control_keeps_the_most_important_neurons_of_the_dense_model(tmp_path: Path) -> None:
    folder = finished()[0]
    plan = Plan.load(folder / "run" / "plan.safetensors")
    control = static_control(folder / "dense", plan, out=tmp_path, of=["moe"], domains=[folder / "run/data/code"])
    pruned = Plan.load(tmp_path / "static" / "moe.plan")
    expected = make_plan(folder / "dense", method="prune", keep=0.5, calibration=tmp_path / "calibration")
    for mine, other in zip(pruned.layers, expected.layers, strict=True):
        assert mine is not None
        assert other is not None
        assert np.array_equal(mine.experts, other.experts)
    written = (tmp_path / "static" / "model.safetensors").stat().st_mtime_ns
    again = static_control(folder / "dense", plan, out=tmp_path, of=["moe"], domains=[folder / "run/data/code"])
    assert again == control
    assert (tmp_path / "static" / "model.safetensors").stat().st_mtime_ns == written
    other = make_plan(folder / "dense", num_experts=4, top_k=1)
    assert static_control(folder / "dense", other, out=tmp_path, of=["moe"]).by == "random"  # and made anew
    assert json.loads((tmp_path / "static" / "config.json").read_text())["intermediate_size"] == 32


def test_there_is_no_control_where_nothing_is_left_out(tmp_path: Path) -> None:
    dense = finished()[0] / "dense"
    upcycled = make_plan(dense, method="upcycle", num_experts=4, top_k=2)
    found = static_control(dense, upcycled, out=tmp_path, of=["moe"])
    assert found.folder is None
    assert found.reason.startswith("192 neurons are active in each layer and the dense FFN has 96")
    assert not any(tmp_path.iterdir())


def test_what_is_wrong_is_told_before_anything_is_made(tmp_path: Path, files: Path) -> None:
    out = tmp_path / "run"
    wrong: list[tuple[type[Exception], str, list[str]]] = [
        (UsageError, "eval.tasks.*unknown task 'piqaa'.*did you mean piqa", ["eval.tasks=piqaa"]),
        (UsageError, "eval.suite.*unknown 'llama'", ["eval.tasks=null", "eval.suite=llama"]),
        (InputError, "no boolq_validation.jsonl", ["eval.tasks=boolq"]),
        (InputError, "no such folder", [f"eval.files={tmp_path}/none"]),
        (InputError, "eval.models.x.*no such folder", [f"eval.models.x={tmp_path}/none/of/it"]),
    ]
    for kind, message, overrides in wrong:
        for dry_run in (False, True):
            with pytest.raises(kind, match=message):
                run(asked(files, out, *overrides), dry_run=dry_run)
            assert not out.exists()
    with pytest.raises(UsageError, match=r"eval\.tasks=piqa: .*a suite and tasks; needed one of them"):
        asked(files, out, "eval.suite=llama-moe")
    with pytest.raises(UsageError, match="'trained' is the run's own; needed another name"):
        asked(files, out, "eval.models.trained=x")
    small = Path(shutil.copytree(finished()[0] / "dense", tmp_path / "small"))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 64}))
    with pytest.raises(InputError, match=r"ids up to \d+; needed below the model's vocab_size 64"):
        run(asked(files, out, f"eval.models.small={small}"))
    assert not out.exists()


def test_a_dry_run_counts_the_prompts(tmp_path: Path, files: Path) -> None:
    found = run(asked(files, tmp_path / "run", "eval.limit=5"), stages=("eval",), dry_run=True).of("eval")
    assert found["models"] == ["dense", "step 0", "trained", "static"]
    assert found["tasks"] == [{"task": "piqa", "num_fewshot": 0, "num_documents": 5, "num_requests": 10}]
    assert found["num_requests"] == 4 * 10
    assert not (tmp_path / "run").exists()


def test_two_folders_are_compared_without_a_run(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished()[0]
    words = [f"eval.models.mixture={folder / 'run/moe'}", "eval.tasks=piqa", f"eval.files={files}"]
    assert main(["eval", str(folder / "dense"), *words, "--out", str(tmp_path / "out"), "--offline"]) == 0
    shown = capsys.readouterr().out
    assert "dense, mixture, static on 13 documents of 1 task" in shown
    assert "change against dense, points" in shown
    assert (
        "static: the dense model with 48 of 96 neurons a layer kept at random, there is no text; not trained" in shown
    )
    assert json.loads((tmp_path / "out/scores.json").read_text())["control"]["by"] == "random"


def test_training_text_is_searched_for_the_benchmarks_by_default(tmp_path: Path, files: Path) -> None:
    path = workplace(tmp_path)
    with (tmp_path / "stories0.jsonl").open("a") as stories:
        stories.write("\n" + json.dumps({"content": (text := f"So tell me {QUESTION} my dear")}))
    given = ["eval.tasks=piqa", f"eval.files={files}", "pretrain=null"]
    config = load_config(path, overrides=given)
    made = run(config, stages=("sift", "prepare"))
    rows = {row["name"]: row["dropped"] for row in made.of("sift")["domains"]}
    assert rows == {"stories": {"13 words of a benchmark": {"documents": 1, "bytes": len(text)}}, "code": {}}
    # Other benchmarks later leave finished text as it is.
    later = load_config(path, overrides=["pretrain=null"])
    assert [done.state for done in run(later, stages=("sift",)).stages] == ["kept"]
    off = load_config(path, overrides=[*given, "data.decontaminate=none", f"out={tmp_path}/off"])
    with pytest.raises(UsageError, match="nothing to sift by"):
        run(off, stages=("sift",))
