"""`prismoe trace`: the stage of a run, any model on any domains, and what is said before long work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from prismoe.cli import main
from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest
from prismoe.routing.findings import BEFORE
from prismoe.routing.record import RoutingTrace
from prismoe.routing.trace import trace
from prismoe.run import run
from prismoe.state import read_state
from tests.runs import config, copy_of, finished


def test_a_run_traces_the_trained_mixture_and_the_one_before() -> None:
    folder, stages = finished()
    out = folder / "run"
    found, before = (RoutingTrace.open(out / "trace" / name) for name in ("trace.safetensors", BEFORE))
    domains = [out / "data" / name for name in ("stories", "code")]
    again = trace(out / "train" / "model", domains, seq_len=16, max_tokens=16_384, seed=3, threads=1)
    np.testing.assert_array_equal(found.load_GLE, again.load_GLE)
    np.testing.assert_array_equal(found.sample_experts_GSLK, again.sample_experts_GSLK)
    manifest = Manifest.read(out / "trace")
    assert manifest is not None
    manifest.check(out / "trace")
    receipt = next(done.receipt for done in stages if done.stage == "trace")
    assert receipt == read_state(out)["trace"]["receipt"]
    assert (
        receipt["model"]["fingerprint"] == found.provenance["model"]["fingerprint"] != receipt["before"]["fingerprint"]
    )
    assert before.provenance["model"]["fingerprint"] == receipt["before"]["fingerprint"]
    assert receipt["drift"] is not None
    assert [row["tokens"] for row in receipt["domains"]] == found.tokens_G.tolist()


def test_benchmarks_make_the_trace_anew_and_nothing_else(tmp_path: Path) -> None:
    out, file = copy_of(tmp_path), tmp_path / "who.jsonl"
    run(config(out=out))
    file.write_text(json.dumps({"question": "Who was the little girl?", "answer": "the king"}))
    under = config(f"trace.benchmarks={file}", "trace.before=null", out=out)
    assert [done.state for done in run(under, stages=("trace",)).stages] == ["made"]
    assert RoutingTrace.open(out).domains == ("stories", "code", "who")
    assert run(under, stages=("trace",)).stages[0].state == "kept"
    file.write_text(json.dumps({"question": "Who was the little girl?", "answer": "no one"}))
    assert run(under, stages=("trace",)).stages[0].state == "made"  # what the file holds, not its name
    states = {done.stage: done.state for done in run(under).stages}
    assert {name for name, state in states.items() if state == "made"} <= {"report"}


def test_wrong_benchmarks_are_told_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no benchmark file"):
        run(config("trace.benchmarks=nowhere.jsonl", out=tmp_path / "new"))
    assert not (tmp_path / "new" / "moe").exists()
    with pytest.raises(InputError, match="no router in it"):
        run(config(f"trace.model={finished()[0] / 'dense'}", out=tmp_path / "new"))
    assert not (tmp_path / "new" / "moe").exists()


def test_a_failed_trace_leaves_the_old_one(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    before = (out / "trace" / "trace.safetensors").read_bytes()
    shutil.rmtree(out / "data" / "code")
    with pytest.raises(InputError):
        run(config("trace.seq_len=8", out=out), stages=("trace",))
    assert (out / "trace" / "trace.safetensors").read_bytes() == before


def test_any_model_on_any_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = finished()[0] / "run"
    words = ["trace", str(run_folder / "moe"), str(run_folder), "trace.seq_len=16", "--seed", "3"]
    assert main([*words, f"trace.before={run_folder / 'train/model'}", "--out", str(tmp_path / "out"), "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    found = RoutingTrace.open(tmp_path / "out")
    np.testing.assert_array_equal(found.load_GLE[::-1], RoutingTrace.open(run_folder / "trace" / BEFORE).load_GLE)
    assert receipt["out"] == str(tmp_path / "out")
    assert main(words) == 0
    shown = capsys.readouterr().out
    for sentence in receipt["sentences"][:-1]:  # the last is about the earlier model
        assert sentence in " ".join(shown.split())


def test_what_the_verb_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished()[0]
    assert main(["trace", str(folder / "run" / "moe")]) == UsageError.exit_code
    assert "a model without text" in capsys.readouterr().err
    assert main(["trace", str(folder / "dense"), str(folder / "run"), "trace.seq_len=16"]) == InputError.exit_code
    assert "no router in it" in capsys.readouterr().err
    assert main(["trace", str(folder / "run" / "moe"), str(tmp_path)]) == InputError.exit_code
    assert "no prepared domain" in capsys.readouterr().err
