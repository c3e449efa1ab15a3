"""A stopped job goes on where the disk has room for the rest alone, and a finished one where it has none."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InterruptedRun, ResourceError
from prismoe.folder import Manifest, bytes_there, claim
from prismoe.recover import RecoverConfig, recover
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.tune import tune
from tests.calibration import make_world
from tests.test_resume import SignalAt
from tests.tiny import tiny_dense
from tests.training import domain_folder, tiny_moe
from tests.tuning import conversations, tiny_config


class Usage(NamedTuple):
    """What `shutil.disk_usage` gives."""

    total: int
    used: int
    free: int


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Say how much room the disk has."""
    return lambda count: monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10**12, 0, count))


def goes_on(work: Callable[[Path], Any], out: Path, free: Callable[[int], None], *, needed: int) -> None:
    """`work` was stopped in `out`: it wants what is missing there, all of it elsewhere, and nothing once it is done."""
    rest = needed - taken(out)
    assert rest < needed - 10_000
    free(rest - 1000)
    with pytest.raises(ResourceError, match="of disk free"):
        work(out)
    free(rest)
    with pytest.raises(ResourceError, match="of disk free"):
        work(out.parent / "new")
    work(out)
    free(0)
    work(out)


def taken(out: Path) -> int:
    found = [path.stat() for path in out.rglob("*") if path.is_file()]
    return sum(min(facts.st_size, 512 * facts.st_blocks) for facts in found)


def test_what_is_there_by_whose_it_is(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert bytes_there(out, kind="a", key="1") == 0
    with claim(out, kind="a", key="1"):
        (out / "inner").mkdir()
        np.memmap(out / "inner" / "holes", np.uint8, "w+", shape=10**8)[: 10**5] = 1
    there = bytes_there(out, kind="a", key="1")
    assert there is not None
    assert 10**5 <= there == taken(out) < 10**7
    assert bytes_there(out, kind="a", key="2") == bytes_there(out, kind="b", key="1") == 0
    assert bytes_there(out, kind="b", key="1", force=True) == there  # it will be cleared away
    Manifest(kind="a", key="1", parents={}, config={}, files={}).write(out)
    assert bytes_there(out, kind="a", key="1") is None
    assert bytes_there(out, kind="a", key="1", force=True) == taken(out)


def test_recover(tmp_path: Path, free: Callable[[int], None]) -> None:
    from prismoe import convert, make_plan

    dense = tiny_dense(tmp_path / "dense", num_hidden_layers=2)
    text = domain_folder(tmp_path / "text", tokenizer=dense / "tokenizer.json", documents=12)
    convert(dense, make_plan(dense, num_experts=4), target="mixtral", out=tmp_path / "moe", pad_to=8)
    config = RecoverConfig(seq_len=16, tokens=640, batch_tokens=64, epochs=1, lr=5e-3, device="cpu", threads=1)

    def work(out: Path, **more: Any) -> int:
        return recover(dense, tmp_path / "moe", config=config, domains=[text], out=out, **more).disk_bytes

    def stop(what: str, done: int, total: int) -> None:
        if "layer 1" in what:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        work(tmp_path / "out", on_progress=stop)
    goes_on(work, tmp_path / "out", free, needed=work(tmp_path / "new", dry_run=True))


def test_calibrate(tmp_path: Path, free: Callable[[int], None]) -> None:
    world = make_world(tmp_path / "world", num_hidden_layers=2)
    settings: dict[str, Any] = {"layers_at_once": 1, "save_seconds": 0.0}

    def work(out: Path) -> None:
        world.run(out, **settings)

    def stop(what: str, done: int, total: int) -> None:
        if 3 * done > 2 * total:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun):
        world.run(tmp_path / "out", on_progress=stop, **settings)
    needs = world.run(tmp_path / "whole", **settings)
    goes_on(work, tmp_path / "out", free, needed=needs.disk_bytes)


def test_tune(tmp_path: Path, free: Callable[[int], None]) -> None:
    source = tiny_moe(tmp_path / "moe")
    config = tiny_config(conversations(tmp_path / "talk.jsonl"), packing=True, batch_size=4, micro_batch_size=2)

    def work(out: Path, **more: Any) -> None:
        tune(source, config, out=out, **more)

    with pytest.raises(InterruptedRun):
        work(tmp_path / "out", on_progress=SignalAt(signal.SIGTERM, "tune step", 2))
    goes_on(work, tmp_path / "out", free, needed=16 * numbers(source) + (16 << 20))


@pytest.mark.parametrize("init", ["source", "random"])
def test_pretrain(tmp_path: Path, free: Callable[[int], None], init: str) -> None:
    source = tiny_moe(tmp_path / "moe")
    text = domain_folder(tmp_path / "text", tokenizer=source / "tokenizer.json")
    config = PretrainConfig(steps=4, seq_len=16, batch_size=2, warmup_steps=0, init=init, threads=1, device="cpu")

    def work(out: Path, **more: Any) -> None:
        pretrain(source, replace(config, **more), domains=[text], out=out)

    with pytest.raises(InterruptedRun):
        work(tmp_path / "out", max_steps=2)
    goes_on(work, tmp_path / "out", free, needed=16 * numbers(source) + (16 << 20))


def numbers(source: Path) -> int:
    return sum(int(np.prod(info.shape)) for info in Checkpoint.open(source).tensors.values())
