"""The study from text to page: stopped and gone on with, an arm that diverges, written text that stays."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from prismoe.errors import InputError
from studies import write as writer
from studies.arms import questions
from studies.design import SIZES, Panel, Question, Setting, jobs_of
from studies.findings import Findings
from studies.parent import DOMAINS
from studies.runner import check_inputs, collect, forecast, restore, study
from studies.work import Places, _curves
from tests.text import jsonl
from tests.tiny import TEXT, tiny_dense

SIZE = replace(
    SIZES["small"],
    tokens=512,
    seeds=(0, 1),
    batch_size=1,
    heldout_documents=2,
    eval_tokens=2,
    calibration_tokens=4096,
    workers=1,
    precision="fp32",
    max_epochs=1e6,
)
QUESTION = Question(
    name="construction",
    title="Two arms",
    paper="none",
    about="For a test.",
    settings=(
        Setting("random", {"evals": 2}),
        Setting("fitted", {"evals": 2, "plan.router": "regressed", "plan.scale": "measured"}),
        Setting("breaks", {"evals": 2, "pretrain.lr": 3.0, "pretrain.router": "noisy_topk"}),
    ),
    panels=(Panel("loss"), Panel("closed", "closed"), Panel("entropy", "entropy")),
)


def corpora(folder: Path) -> Path:
    for number, name in enumerate(DOMAINS):
        texts = [" ".join((TEXT[number % 3], TEXT[(number + i) % 3]) * 20) for i in range(6)]
        jsonl(folder / name / "train-0.jsonl", texts)
        jsonl(folder / name / "heldout.jsonl", texts[:3])
    return folder


def test_two_arms_end_to_end_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, text = tiny_dense(tmp_path / "parent"), corpora(tmp_path / "corpora")
    places, results, docs = Places(parent, tmp_path / "out"), tmp_path / "results", tmp_path / "docs"
    source = check_inputs(parent, text)
    monkeypatch.setattr("studies.runner.run", stopping_after(2))
    with pytest.raises(KeyboardInterrupt):
        study([QUESTION], SIZE, places, corpora=text, say=lambda line: None)
    first = {path: path.stat().st_mtime_ns for path in places.folder.glob("runs/*/result.json")}
    assert len(first) == 2
    assert "6 runs, " in forecast([QUESTION], SIZE, places, source=source)[-1]
    assert "4 runs left" in forecast([QUESTION], SIZE, places, source=source)[-1]

    monkeypatch.undo()
    said: list[str] = []
    assert study([QUESTION], SIZE, places, corpora=text, say=said.append) == []
    jobs = jobs_of([QUESTION], SIZE, source=source)
    assert len(said) == 4
    assert {path: path.stat().st_mtime_ns for path in first} == first, "a finished run was run again"
    collect([QUESTION], SIZE, places, source=source, out=results)
    runs = {run["key"]: run for run in json.loads((results / "construction.json").read_bytes())["runs"]}
    by_name = {(job.names[0].split(": ")[1], job.seed): runs[job.key] for job in jobs}
    for seed in SIZE.seeds:
        plain = by_name["random", seed]
        assert plain["diverged"] == ""
        assert plain["tokens"] == 512 == plain["curve_tokens"][-1]
        assert set(plain["heldout"]) == set(plain["documents"]) == set(DOMAINS)
        assert np.array(plain["load"]).shape == (3, 8)
        assert np.allclose(np.sum(plain["load"], axis=1), 1, atol=4e-3)
        assert by_name["breaks", seed]["diverged"], "an arm that diverges is said to"

    restore(results, elsewhere := Places(parent, tmp_path / "elsewhere"))
    assert "0 runs left" in forecast([QUESTION], SIZE, elsewhere, source=source)[-1], "another clone begins again"

    page = writer_page(results, docs, monkeypatch)
    assert "| breaks | 2, 2 diverged |" in page
    assert "| random | 2 |" in page
    loss = np.mean([Findings(results).lines("construction")[0].end])
    assert f"{loss:.3f}" in page
    empty = f"<!-- conclusions construction -->\n{writer.EMPTY}\n<!-- end -->"
    mine = empty.replace(writer.EMPTY, "Fitted rows win.\n\nBy much.")
    (docs / "study.md").write_text(page.replace(empty, mine))
    assert mine in writer_page(results, docs, monkeypatch)
    assert (docs / "study" / "construction.png").read_bytes()[:4] == b"\x89PNG"


def test_a_study_that_is_not_finished_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, text = tiny_dense(tmp_path / "parent"), corpora(tmp_path / "corpora")
    places, results = Places(parent, tmp_path / "out"), tmp_path / "results"
    source = check_inputs(parent, text)
    jobs = jobs_of([QUESTION], SIZE, source=source)
    order = [name for name in ("fitted", "breaks", "random") for job in jobs if job.names[0].endswith(name)][::2]
    monkeypatch.setattr(
        "studies.runner.jobs_of",
        lambda *_, **__: sorted(jobs, key=lambda job: (job.seed, order.index(job.names[0].split(": ")[1]))),
    )
    monkeypatch.setattr("studies.runner.run", stopping_after(1))
    with pytest.raises(KeyboardInterrupt):
        study([QUESTION], SIZE, places, corpora=text, say=lambda line: None)
    monkeypatch.undo()
    collect([QUESTION], SIZE, places, source=source, out=results)
    page = writer_page(results, tmp_path / "docs", monkeypatch)
    assert "**5 of 6 runs are not there yet.**" in page
    assert "Not run yet: random, breaks." in page
    [row] = [line for line in page.splitlines() if line.startswith("| fitted |")]
    assert row.split(" | ")[1] == "1 of 2"
    assert row.split(" | ")[4:8] == ["", "", "", ""], "what it would be compared with is not there"
    assert "**" not in row


def test_an_evaluation_that_was_made_twice_counts_once(tmp_path: Path) -> None:
    [job] = jobs_of([replace(QUESTION, settings=QUESTION.settings[:1])], replace(SIZE, seeds=(0,)), source="x")
    evals = [
        {"event": "eval", "step": step, "heldout": {"a": {"loss": loss}}} for step, loss in [(0, 5), (1, 4), (1, 3)]
    ]
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in evals))
    found = _curves(log, job, 100, [])
    assert found["curve_tokens"] == [100, 356]
    assert found["heldout"] == {"a": [5, 3]}


def writer_page(results: Path, docs: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    docs.mkdir(exist_ok=True)
    monkeypatch.setattr(writer, "questions", lambda: [QUESTION])
    return writer.write(results, docs).read_text()


def stopping_after(count: int) -> Any:
    from studies.work import run

    left = iter(range(count))

    def interrupted(job: Any, places: Places) -> dict[str, Any]:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run(job, places)

    return interrupted


def test_the_loss_of_documents_is_that_of_the_evaluation(tmp_path: Path) -> None:
    parent, text = tiny_dense(tmp_path / "parent"), corpora(tmp_path / "corpora")
    places = Places(parent, tmp_path / "out")
    question = replace(QUESTION, settings=())
    size = replace(SIZE, eval_tokens=10_000)
    study([question], size, places, corpora=text)
    collect([question], size, places, source=check_inputs(parent, text), out=tmp_path / "results")
    found = Findings(tmp_path / "results")
    assert found.parent_loss == pytest.approx(found.parent_heldout, abs=2e-3)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no parent.*PARENT=") as none:
        check_inputs(tmp_path / "parent", tmp_path)
    parent = tiny_dense(tmp_path / "parent")
    with pytest.raises(InputError, match=r"no text of commoncrawl.*CORPORA=") as no_text:
        check_inputs(parent, tmp_path)
    assert "\n" not in str(none.value) + str(no_text.value)
    weights = load_file(parent / "model.safetensors")
    text = corpora(tmp_path / "corpora")
    before = check_inputs(parent, text)
    save_file({**weights, "x": np.zeros(1, np.float32)}, parent / "model.safetensors")
    assert check_inputs(parent, text) != before, "another parent is another study"


def test_every_arm_is_a_setting_of_the_house() -> None:
    """Names, keys and panels fit together, before hours are spent on them."""
    from prismoe.train.settings import PretrainConfig

    asked = questions()
    assert [question.name for question in asked] == [
        *("construction", "rescaling", "sampling", "filtering", "scratch", "balance", "upcycling", "recovery")
    ]
    for question in asked:
        names = [setting.name for setting in question.settings]
        assert len({*names}) == len(names)
        for panel in question.panels:
            assert {*panel.settings} <= {*names}
            assert len(panel.settings) <= 8
    jobs = jobs_of(asked, SIZES["small"], source="")
    assert len({job.key for job in jobs}) == len(jobs)
    assert max(len(job.names) for job in jobs) == 4, "the base recipe is run once for four questions"
    for job in jobs:
        pretrain = {key: value for key, value in job.spec["pretrain"].items() if key != "reference"}
        PretrainConfig(**pretrain)
