"""`pretrain.experts: fastest`: only functions that are right are timed, and a run keeps the one it began with."""

import json
import time
from dataclasses import replace

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from prismoe.errors import InputError, InterruptedRun, UsageError
from prismoe.train import experts, fastest
from prismoe.train.experts import experts_of, sorted_experts
from prismoe.train.fastest import CHOICE, try_experts
from prismoe.train.model import load_model
from prismoe.train.pretrain import PretrainConfig, pretrain
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe

CONFIG = PretrainConfig(
    **{"steps": 4, "warmup_steps": 1, "seq_len": 32, "batch_size": 4, "save_every": 2, "eval_tokens": 200},
    **{"lr": 1e-3, "max_epochs": 50.0, "threads": 1, "experts": "fastest"},
)
CPU = torch.device("cpu")


def slow(*given):
    time.sleep(0.2)  # many times what any other takes here
    return sorted_experts(*given)


@pytest.fixture
def module(tmp_path):
    return experts_of(load_model(tiny_moe(tmp_path / "model")).to("meta"))[0]


@pytest.fixture
def added():
    """Functions that a test adds to the library's table."""
    before = dict(ALL_EXPERTS_FUNCTIONS._global_mapping)
    yield ALL_EXPERTS_FUNCTIONS
    for name in ALL_EXPERTS_FUNCTIONS._global_mapping.keys() - before.keys():
        del ALL_EXPERTS_FUNCTIONS._global_mapping[name]


@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_here_is_tried(module, bf16):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trial = try_experts(module, tokens=48, top_k=2, device=CPU, bf16=bf16)
    assert trial.milliseconds.keys() == {"sorted", "eager", "grouped_mm", "batched_mm"}
    assert trial.milliseconds[trial.function] <= 1.05 * min(trial.milliseconds.values())
    assert trial.left_out == dict.fromkeys(("sonicmoe", "deepgemm"), "package kernels is not installed")
    assert torch.equal(torch.get_rng_state(), before)
    assert module.config._experts_implementation != "batched_mm"


def test_functions_that_are_wrong_fail_or_cost_too_much_are_left_out(module, added, monkeypatch):
    def inexact(*given):
        return sorted_experts(*given) * 1.001

    def detached(self, x_TD, index_TK, weights_TK):  # the output is right
        return sorted_experts(self, x_TD, index_TK, 2 * weights_TK.detach() - weights_TK)

    calls = []

    def drifting(*given):
        calls.append(0)
        return sorted_experts(*given) * (1 + 1e-6 * len(calls))

    for function in (inexact, detached, drifting):
        added.register(function.__name__, function)
    monkeypatch.setattr(fastest, "_MOST_COPIED", 3 * 64 * 32 * 4 * 96 - 1)
    trial = try_experts(module, tokens=48, top_k=2, device=CPU, bf16=False)
    assert trial.milliseconds.keys() == {"sorted", "eager", "grouped_mm"}
    assert trial.left_out["inexact"] == "the output is off by 1.0e-03"
    assert trial.left_out["detached"] == "weights is off by 2.0e+00"
    assert trial.left_out["drifting"] == "the output has other bits the second time"
    assert trial.left_out["batched_mm"].startswith("copies an expert for every choice")


def test_rows_that_a_function_does_not_take_leave_it_out(tmp_path):
    (module, _) = experts_of(load_model(tiny_moe(tmp_path / "model", intermediate_size=30)))
    trial = try_experts(module, tokens=48, top_k=2, device=CPU, bf16=False)
    assert "multiple of 16 bytes" in trial.left_out["grouped_mm"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A mixture of which grouped_mm is no choice, a dense model and a domain."""
    base = tmp_path_factory.mktemp("ground")
    tiny_moe(base / "moe", intermediate_size=30)
    tiny_dense(base / "dense")
    domain_folder(base / "text", tokenizer=base / "moe" / "tokenizer.json")
    return base


def train(ground, out, config, *, said=None):
    def progress(what, *_):
        if said is not None:
            said.append(what)

    return pretrain(ground / "moe", config, domains=[ground / "text"], out=out, on_progress=progress)


def test_a_run_goes_on_with_the_function_it_began_with(ground, tmp_path, monkeypatch):
    train(ground, tmp_path / "eager", replace(CONFIG, experts="eager"))
    with monkeypatch.context() as begun:
        begun.setattr(experts, "sorted_experts", slow)
        begun.setattr(fastest, "_MOST_COPIED", 0)
        with pytest.raises(InterruptedRun):
            train(ground, tmp_path / "out", replace(CONFIG, max_steps=3))
    record = json.loads((tmp_path / "out" / CHOICE).read_text())["cpu"]
    assert (record["function"], record["tokens"]) == ("eager", 128)
    assert record["milliseconds"].keys() == {"eager", "sorted"}
    said: list[str] = []
    done = train(ground, tmp_path / "out", CONFIG, said=said)  # sorted would be the faster one now
    assert done.resumed_from == 3
    assert done.runtime["experts"] == "eager"
    assert "experts: eager, as before the stop" in said
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "eager" / name).read_bytes()


@pytest.mark.parametrize("record", [None, "{", "[]", '{"cpu": {}}', '{"cpu": {"function": "gone"}}'])
def test_a_run_does_not_go_on_without_knowing_it(ground, tmp_path, record):
    with pytest.raises(InterruptedRun):
        train(ground, tmp_path / "out", replace(CONFIG, max_steps=2))
    path = tmp_path / "out" / CHOICE
    path.unlink() if record is None else path.write_text(record)
    expected = UsageError if record and "gone" in record else InputError
    with pytest.raises(expected, match=r"experts\.json.*(cannot be read|is not here).*--force begins anew"):
        train(ground, tmp_path / "out", CONFIG)


def test_on_a_device_of_another_kind_it_is_tried_anew(ground, tmp_path):
    with pytest.raises(InterruptedRun):
        train(ground, tmp_path / "out", replace(CONFIG, max_steps=2))
    path = tmp_path / "out" / CHOICE
    path.write_text('{"cuda": {"function": "deepgemm"}}')
    train(ground, tmp_path / "out", CONFIG)
    found = json.loads(path.read_text())
    assert found["cuda"] == {"function": "deepgemm"}
    assert found["cpu"]["function"] in ("sorted", "eager", "batched_mm")


def test_nothing_is_tried_for_a_dense_model(ground, tmp_path):
    config = replace(CONFIG, steps=2)
    done = pretrain(ground / "dense", config, domains=[ground / "text"], out=tmp_path / "out")
    assert done.runtime["experts"] is None
    assert not (tmp_path / "out" / CHOICE).exists()
