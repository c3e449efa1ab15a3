"""Model cards: written from receipts, valid for the hub, never over a person's own, and no part of a manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from prismoe.folder import Manifest
from prismoe.report.card import NAME, write_cards
from prismoe.report.page import Findings
from prismoe.state import read_state
from tests.report import task_rows
from tests.runs import copy_of, finished


def findings(out: Path, **changed: dict[str, Any]) -> Findings:
    receipts = {name: record["receipt"] for name, record in read_state(out).items()}
    for name, facts in changed.items():
        receipts[name] = receipts[name] | facts
    return Findings(out, receipts, {})


def cards(found: Findings) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in write_cards(found)}


def test_a_finished_run_has_a_card_in_each_model_folder(tmp_path: Path) -> None:
    out = finished()[0] / "run"
    for folder in (out / "moe", out / "train" / "model"):
        found = Manifest.read(folder)
        assert found is not None
        assert NAME not in found.files
        found.check(folder)  # the folder still is what its manifest says
        front = yaml.safe_load((folder / NAME).read_text().split("---\n")[1])
        assert front["library_name"] == "transformers"
        assert not {"license", "base_model", "language"} & front.keys()  # the parent, a local folder, states none
        assert ModelCard.load(folder / NAME).data.tags == ["mixture-of-experts", "prismoe", "mixtral"]
    trained = (out / "train" / "model" / NAME).read_text()
    assert "states no licence" in trained
    receipts = {done.stage: done.receipt for done in finished()[1]}
    for row in (row for row in receipts["eval"]["scores"] if row["model"] == "trained"):
        assert f"| {row['perplexity']:,.2f} | {row['bits_per_byte']:.3f} |" in trained
    for share in receipts["pretrain"]["mixture"]:
        assert f"| {share['name']} | {100 * share['requested']:.1f} % | {100 * share['achieved']:.1f} % |" in trained
    assert "not trained after the conversion" in (out / "moe" / NAME).read_text()
    assert "not trained after the conversion" not in trained


def test_licence_and_language_are_the_parents(tmp_path: Path) -> None:
    out, parent = copy_of(tmp_path), tmp_path / "parent"
    parent.mkdir()
    (parent / NAME).write_text("---\nlicense: other\nlicense_name: own\nlanguage: [en, de]\n---\n# A parent\n")
    text = cards(findings(out, plan={"source_name": str(parent)}))["moe"]
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["license_name"], front["language"]) == ("other", "own", ["en", "de"])
    assert "states no licence" not in text
    (parent / NAME).write_text("---\nlicense: [broken\n---\n")
    (parent / "config.json").write_text(json.dumps({"license": "mit"}))
    assert (
        yaml.safe_load(cards(findings(out, plan={"source_name": str(parent)}))["moe"].split("---\n")[1])["license"]
        == "mit"
    )


def test_a_parents_card_of_a_stranger_says_nothing_or_texts(tmp_path: Path) -> None:
    out, parent = copy_of(tmp_path), tmp_path / "parent"
    parent.mkdir()
    for lines in ("d: 2001-99-99", f"a: {'[' * 3000}", "b: &a [x, x]\nlicense: [[*a, *a]]"):
        (parent / NAME).write_text(f"---\n{lines}\n---\n# A parent\n")
        text = cards(findings(out, plan={"source_name": str(parent)}))["moe"]
        assert "license" not in yaml.safe_load(text.split("---\n")[1])


def test_limits_say_what_was_and_was_not_measured(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    plain = cards(findings(out, eval={"tasks": [], "findings": []}))["model"]
    assert "No benchmark was run." in plain
    rows = [row | {"above_chance": row["task"] != "arc_challenge"} for row in task_rows()]
    eval_ = {"tasks": rows, "findings": ["trained does not beat its static control on average over 3 tasks."]}
    text = cards(findings(out, eval=eval_, verify={"passed": False}))["model"]
    assert "No benchmark was run." not in text
    assert "- No better than guessing on arc_challenge." in text
    assert "- trained does not beat its static control on average over 3 tasks." in text
    assert "FAILED: do not use this model" in text
    assert "| sciq | acc | 0 | 25.0 | 61.0 ± 1.4 | 59.0 ± 1.4 | not significant |" in text
    results = ModelCard(text).data.eval_results
    assert results is not None
    found = {row.dataset_name: (row.metric_type, row.metric_value) for row in results}
    assert found["sciq"] == ("acc", pytest.approx(0.59))
    assert set(found) == {row["task"] for row in rows}
    assert [line for line in text.splitlines() if line.startswith("|") and line.count("|") < 3] == []


def test_a_card_that_a_person_wrote_or_changed_is_left_alone(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    own, changed = out / "moe" / NAME, out / "train" / "model" / NAME
    own.write_text("# Mine\n")
    changed.write_text(changed.read_text().replace("# ", "# My ", 1))
    before = own.read_text(), changed.read_text()
    write_cards(findings(out))
    assert (own.read_text(), changed.read_text()) == before
    changed.unlink()
    write_cards(findings(out))
    assert re.search(r"<!-- prismoe [0-9a-f]{16} -->\n$", changed.read_text())


def test_a_name_cannot_break_the_front_matter(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    bad = "models/x: [\n---\nlicense: mit"
    text = cards(findings(out, plan={"source_name": bad}))["moe"]
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "transformers"
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


@pytest.fixture(autouse=True)
def _quiet_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
