"""A stopped tuning goes on by the same command and ends with the bytes of one that never stopped."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from prismoe.errors import InterruptedRun
from prismoe.tune import tune
from tests.test_resume import SignalAt, contents
from tests.training import tiny_moe
from tests.tuning import conversations, tiny_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("source") / "moe", attention_dropout=0.1)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = conversations(tmp_path_factory.mktemp("data") / "talk.jsonl")
    return tiny_config(data, packing=True, batch_size=4, micro_batch_size=2, save_every=3)


@pytest.fixture(scope="module")
def unstopped(source, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("unstopped") / "out"
    receipt = tune(source, config, out=out)
    assert receipt.steps > 8
    return contents(out), receipt.steps


def test_stopped_by_a_signal_in_both_epochs(source, config, unstopped, tmp_path):
    out, steps = tmp_path / "out", unstopped[1]
    for at in (1, steps // 2 + 1):
        with pytest.raises(InterruptedRun, match=f"stopped by SIGTERM after step {at} of {steps}"):
            tune(source, config, out=out, on_progress=SignalAt(signal.SIGTERM, "tune step", at))
        assert not (out / "model").exists()
    assert tune(source, config, out=out).resumed_from == steps // 2 + 1
    assert contents(out) == unstopped[0]


def test_adapters_go_on_where_they_stopped(source, config, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    config = replace(config, lora_rank=2, epochs=1)
    with pytest.raises(InterruptedRun, match="stopped by max_steps after step 2 of"):
        tune(source, replace(config, max_steps=2), out=out)
    assert tune(source, config, out=out).resumed_from == 2
    tune(source, config, out=whole)
    assert contents(out) == contents(whole)


KILLED = """
import json, os, signal, sys
from prismoe.tune import TuneConfig, tune
source, out, settings = sys.argv[1:]
def progress(what, done, total):
    if what.startswith("tune step") and done == 5:
        os.kill(os.getpid(), signal.SIGKILL)
settings = json.loads(settings)
settings["lora_targets"] = tuple(settings["lora_targets"])
tune(source, TuneConfig(**settings), out=out, on_progress=progress)
"""


def test_killed(source, config, unstopped, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(out), json.dumps(asdict(config))]
    assert subprocess.run(command, env=os.environ, capture_output=True).returncode == -signal.SIGKILL
    assert tune(source, config, out=out).resumed_from == 3
    assert contents(out) == unstopped[0]
