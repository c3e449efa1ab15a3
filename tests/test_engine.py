"""Steps that are left out, runs that go back, stop early or for a while, and processes that stand still."""

import json
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
from torch.distributed import HashStore

from prismoe.errors import InterruptedRun, NumericalError, UsageError
from prismoe.train.engine.watchdog import Watchdog, behind
from prismoe.train.fit import num_experts
from prismoe.train.health import Health
from prismoe.train.metrics import read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from tests.training import domain_folder, tiny_moe

CONFIG = PretrainConfig(
    steps=12, seq_len=32, batch_size=4, warmup_steps=2, lr=1e-3, max_epochs=500.0, threads=1, eval_tokens=300
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_moe(tmp_path_factory.mktemp("source") / "moe")


@pytest.fixture(scope="module")
def domains(source, tmp_path_factory):
    return [domain_folder(tmp_path_factory.mktemp("domains") / "a", tokenizer=source / "tokenizer.json")]


def test_what_is_left_out():
    health = Health(spike=10.0, limit=3, rollbacks=1)
    assert [health.judge(loss=5.0, norm=1.0) for _ in range(16)] == [""] * 16
    assert health.judge(loss=5.0, norm=9.9) == ""
    assert health.judge(loss=5.0, norm=10.5) == "gradient norm 10.5 is 10 times the usual 1"
    assert health.judge(loss=float("nan"), norm=1.0) == "loss is nan"
    assert (health.in_a_row, health.must_go_back) == (2, False)
    assert health.judge(loss=5.0, norm=float("inf")) == "gradient norm is inf"
    assert health.must_go_back
    again = Health(spike=10.0, limit=3, rollbacks=1)
    again.restore(json.loads(json.dumps(health.state())))
    assert again == health
    health.go_back(step=20, to=12, found="loss is nan")
    assert (health.passed_over, health.in_a_row, health.skipped) == (8, 0, 3)
    with pytest.raises(
        NumericalError, match=r"step 30: loss is nan; 0 steps in a row were left out, and it went back 1"
    ):
        health.go_back(step=30, to=12, found="loss is nan")
    early = Health(spike=1.0, limit=1, rollbacks=5)
    assert early.judge(loss=1.0, norm=1e9) == "", "nothing is usual yet"


def test_a_run_goes_back_reads_other_text_and_gives_up(tmp_path, source, domains):
    """Half the usual norm counts as a spike here, so that steps 17 to 19 are always left out."""
    config = replace(CONFIG, steps=40, spike=0.5, skip_limit=3, rollbacks=2, save_every=10)
    with pytest.raises(NumericalError, match="and it went back 2 times") as caught:
        pretrain(source, config, domains=domains, out=tmp_path / "out")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "out" / "model").exists()
    lines = read_metrics(tmp_path / "out" / "metrics.jsonl")
    events = [(line["event"], line["step"]) for line in lines if line["event"] in ("skipped", "rollback")]
    left_out = [("skipped", step) for step in (17, 18, 19)]
    assert events == [*left_out, ("rollback", 19), *left_out, ("rollback", 19), *left_out]
    assert [line["passed_over"] for line in lines if line["event"] == "rollback"] == [9, 18]
    eleventh = [line["loss"] for line in lines if line["event"] == "step" and line["step"] == 11]
    assert len(set(eleventh)) == 3, "the same text again"


def test_nothing_to_go_back_to(tmp_path, source, domains):
    config = replace(CONFIG, steps=40, spike=0.5)
    with pytest.raises(NumericalError, match="there is no checkpoint to go back to"):
        pretrain(source, config, domains=domains, out=tmp_path / "out")


def test_patience(tmp_path, source, domains):
    """Weights that do not move never lower the held-out loss: evaluations at 2 and 4 are the second and third."""
    config = replace(CONFIG, lr=1e-30, eval_every=2, patience=2)
    trained = pretrain(source, config, domains=domains, out=tmp_path / "out")
    assert trained.steps == 4
    assert (trained.model / "model.safetensors").is_file()
    assert pretrain(source, config, domains=domains, out=tmp_path / "out").resumed_from == 4


def test_some_steps_at_a_time(tmp_path, source, domains):
    whole = pretrain(source, CONFIG, domains=domains, out=tmp_path / "whole")
    config = replace(CONFIG, max_steps=5)
    for done in (5, 10):
        with pytest.raises(InterruptedRun, match=f"stopped by max_steps after step {done} of 12"):
            pretrain(source, config, domains=domains, out=tmp_path / "parts")
    parts = pretrain(source, config, domains=domains, out=tmp_path / "parts")
    assert parts.resumed_from == 10
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (whole.model.parent / name).read_bytes() == (parts.model.parent / name).read_bytes(), name
    clock = [json.loads(line) for line in (tmp_path / "parts" / "timing.jsonl").read_text().splitlines()]
    assert [line["step"] for line in clock] == list(range(1, 13))
    assert all(line["tokens_per_second_device"] > 0 and line["memory_bytes"] > 1e7 for line in clock)


def test_a_budget_of_tokens():
    assert PretrainConfig(tokens=1000, batch_size=6, seq_len=32, warmup_steps=0).steps == 6
    with pytest.raises(UsageError, match="1000 tokens and 7 steps; needed one"):
        PretrainConfig(tokens=1000, steps=7, batch_size=6, seq_len=32, warmup_steps=0)


def test_recomputed_activations_give_the_same_training(tmp_path, source, domains):
    """Router noise is a function of the token's place, so that the second forward pass draws it again."""
    losses = []
    for recompute in (False, True):
        config = replace(CONFIG, router="noisy_topk", recompute=recompute, steps=6)
        pretrain(source, config, domains=domains, out=tmp_path / str(recompute))
        losses.append([line["loss"] for line in read_metrics(tmp_path / str(recompute) / "metrics.jsonl")[1:-1]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(losses[0]) == 6


def test_a_rank_that_stands_still_is_named():
    store, said, heard = HashStore(), [], threading.Event()

    def give_up(line):
        said.append(line)
        heard.set()

    waiting, late = (
        Watchdog(store, rank=rank, world=2, timeout=limit, give_up=give_up) for rank, limit in ((0, 0.4), (1, 60.0))
    )
    late.note(7, "forward")
    late.start()
    for phase in ("forward", "backward", "adding up gradients"):
        waiting.note(7, phase)
    waiting.start()
    assert heard.wait(20)
    waiting.stop()
    late.stop()
    (line,) = said
    assert line.startswith("step 7: rank 1 ")
    assert "phase 'forward'" in line
    assert "seen by rank 0, which waits in 'adding up gradients' of step 7" in line


def test_a_process_that_moves_is_left_alone():
    said = []
    watchdog = Watchdog(HashStore(), rank=0, world=1, timeout=0.5, give_up=said.append)
    watchdog.start()
    for step in range(8):
        watchdog.note(step, "forward")
        time.sleep(0.1)
    watchdog.stop()
    assert said == []


def test_who_holds_up_the_others():
    def place(count, since):
        return {"count": count, "step": 3, "phase": "backward", "since": since}

    places = {0: place(9, 100.0), 1: place(8, 100.0), 2: place(9, 99.0)}
    assert "rank 1 has not moved from phase 'backward' for 30 s" in str(behind(places, me=0, stood=30.0, now=101.0))
    places[1] = place(8, 60.0)
    assert "rank 1 has said nothing since phase 'backward'" in str(behind(places, me=0, stood=30.0, now=101.0))
    places[1] = place(9, 60.0)  # it had come as far as the others when it said so
    line = str(behind(places, me=2, stood=30.0, now=101.0))
    assert "rank 1 has said nothing since phase 'backward' for 30 s" in line
    assert "seen by rank 2, which waits in 'backward' of step 3;" in line


@pytest.mark.parametrize("name", ["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"])
def test_every_spelling_of_the_number_of_experts_is_known(name: str) -> None:
    assert num_experts({name: 8}) == 8
    assert num_experts({name: 1}) == num_experts({name: None}) == num_experts({}) == 0


def test_a_store_that_goes_with_rank_0_is_told_by_the_watchdog():
    from torch.distributed import TCPStore

    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = TCPStore("127.0.0.1", server.port, is_master=False)
    said, told = [], threading.Event()
    dog = Watchdog(client, rank=1, world=2, timeout=0.4, give_up=lambda line: (said.append(line), told.set()))
    dog.start()
    dog.note(7, "backward")
    del server
    assert told.wait(60)
    dog.stop()
    assert said[0].startswith("step 7: rank 0, or the launcher, which keep the places of all, do not answer for")
    assert "rank 1, which waits in 'backward'" in said[0]


def test_a_store_that_stands_still_with_rank_0_is_told_by_the_watchdog():
    """Its kernel keeps the connection: an answer would be waited for without end."""
    from torch.distributed import TCPStore

    reader, writer = os.pipe()
    process = os.fork()
    if not process:
        try:
            server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            os.write(writer, str(server.port).encode())
            signal.pause()
        finally:
            os._exit(0)
    client = TCPStore("127.0.0.1", int(os.read(reader, 9)), is_master=False)
    said, told = [], threading.Event()
    dog = Watchdog(client, rank=1, world=2, timeout=0.4, give_up=lambda line: (said.append(line), told.set()))
    dog.note(7, "backward")
    os.kill(process, signal.SIGSTOP)
    dog.start()
    try:
        assert told.wait(60)
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    dog.stop()
    assert said[0].startswith("step 7: rank 0, or the launcher, which keep the places of all, do not answer for")
