"""Curves of a run, read back by TensorBoard itself: the numbers of the log, once each."""

import resource
import threading
import time

import pytest

from prismoe.errors import InterruptedRun, ResourceError
from prismoe.train.metrics import read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.scalars import Scalars
from tests.training import domain_folder, tiny_moe

pytest.importorskip("tensorboard")


def curves(folder):
    """{name: [(step, value)]} as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return {name: [(point.step, point.value) for point in found.Scalars(name)] for name in found.Tags()["scalars"]}


def next_second():
    """Files of one second are read in the order of their numbers as text; commands of people are further apart."""
    before = int(time.time())
    while int(time.time()) == before:
        time.sleep(0.02)


def test_points_behind_a_checkpoint_are_drawn_again_and_not_twice(tmp_path):
    scalars = Scalars(tmp_path)
    scalars.begin(None)
    for step in range(6):
        scalars.add("step", {"event": "step", "step": step, "loss": 1.0 * step, "by_domain": {"a": 2.0}, "load": [1]})
    scalars.close()
    next_second()
    scalars.begin(3)  # killed after step 5, the last checkpoint is that of step 3
    for step in range(4, 7):
        scalars.add("step", {"event": "step", "step": step, "loss": 10.0 * step})
    scalars.close()
    assert curves(tmp_path) == {
        "train/loss": [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)],
        "train/by_domain/a": [(step, 2.0) for step in range(4)],
    }
    Scalars(tmp_path / "muted", muted=True).begin(None)
    assert not (tmp_path / "muted").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file: cannot write"):
        Scalars(tmp_path / "file").begin(None)


def test_a_full_disk_is_told_by_us_and_not_by_the_thread(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # as it is without pytest
    scalars = Scalars(tmp_path)
    scalars.begin(None)

    def draw():
        for step in range(1000):
            scalars.add("step", {"event": "step", "step": step, "loss": 1.0})
            scalars.flush()

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(ResourceError, match=r"cannot write: File too large; needed more \(hint: free some space"):
            draw()
        scalars.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capfd.readouterr().err == ""


def test_the_curves_of_a_run_are_its_log(tmp_path):
    source = tiny_moe(tmp_path / "moe")
    domains = [
        domain_folder(tmp_path / name, tokenizer=source / "tokenizer.json", seed=i) for i, name in enumerate("ab")
    ]
    settings = {"steps": 6, "seq_len": 32, "batch_size": 4, "warmup_steps": 2, "eval_every": 3, "eval_tokens": 300}
    config = PretrainConfig(**settings, max_epochs=500.0, threads=1, max_steps=4)
    with pytest.raises(InterruptedRun):
        pretrain(source, config, domains=domains, out=tmp_path / "out")
    next_second()
    pretrain(source, config, domains=domains, out=tmp_path / "out")
    found, log = curves(tmp_path / "out" / "tensorboard"), read_metrics(tmp_path / "out" / "metrics.jsonl")
    steps = [line for line in log if line["event"] == "step"]
    evals = [line for line in log if line["event"] == "eval"]
    for key in ("loss", "lr", "gradient_norm", "router_gradient_norm", "router_loss"):
        assert found[f"train/{key}"] == [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in steps], key
    heldout = [(line["step"], pytest.approx(line["heldout"]["b"]["loss"], rel=1e-6)) for line in evals]
    assert found["eval/heldout/b/loss"] == heldout
    assert [step for step, _ in found["timing/tokens_per_second_device"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in heldout] == [0, 3, 6]
