"""Checkpoints are written while training goes on, and are worth what those are that training waits for."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from prismoe.errors import ResourceError
from prismoe.folder import Manifest
from prismoe.train import checkpoints, saving
from prismoe.train.engine import Engine
from prismoe.train.engine.layout import Layout
from prismoe.train.pretrain import pretrain
from prismoe.train.routers import Policy
from prismoe.train.saving import Saver
from tests.test_resume import CONFIG, contents, made


@pytest.fixture
def source():
    return made()[0]


@pytest.fixture
def domains():
    return made()[1]


@pytest.fixture
def unstopped():
    return made()[2]


@pytest.fixture
def held(monkeypatch):
    """Saves in other threads wait for this event before they write."""
    event, write = threading.Event(), checkpoints.save

    def later(*args, **kwargs):
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(30)
        return write(*args, **kwargs)

    monkeypatch.setattr(checkpoints, "save", later)
    return event


def small():
    """A linear layer after one AdamW step, so that there are moments."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    return model, optimizer


def state_of(model, optimizer):
    return checkpoints.tensors_of(model, Policy([]), optimizer)


def alone():
    return Engine(Layout(), rank=0, device=torch.device("cpu"))


def test_processes_that_are_lost_while_saving_are_told_with_the_step_that_is_saved(tmp_path):
    engine = alone()
    checkpoints.save(tmp_path, step=3, engine=engine, tensors=state_of(*small()), state={})
    assert str(engine.lost(RuntimeError("gone"))).startswith("step 3, saved: rank 0 lost the others (gone)")


def test_what_is_saved_is_what_was_there_when_asked(tmp_path, held):
    model, optimizer = small()
    saver = Saver(tmp_path / "checkpoints", keep=2, engine=alone())
    expected = {name: tensor.clone() for name, tensor in state_of(model, optimizer).items()}
    saver.save(state_of(model, optimizer), step=1, state={"step": 1})
    for tensor in state_of(model, optimizer).values():
        tensor.fill_(7.0)  # training goes on
    assert checkpoints.latest(tmp_path / "checkpoints", alone()) is None
    held.set()
    saver.wait()
    path = checkpoints.latest(tmp_path / "checkpoints", alone())
    state = checkpoints.restore(path, engine=alone(), model=model, policy=Policy([]), optimizer=optimizer)
    assert state == {"step": 1}
    found = state_of(model, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not any(torch.equal(tensor, torch.full_like(tensor, 7.0)) for tensor in found.values())


def test_a_save_waits_for_the_one_before(tmp_path, held):
    model, optimizer = small()
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, keep=1, engine=alone())
    saver.save(state_of(model, optimizer), step=1, state={})
    threading.Timer(0.2, held.set).start()
    saver.save(state_of(model, optimizer), step=2, state={})
    assert Manifest.read(folder / "step-00000001") is not None or Manifest.read(folder / "step-00000002") is not None
    saver.wait()
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


def test_an_error_of_the_thread_comes_once_and_with_its_message(tmp_path):
    model, optimizer = small()
    folder = tmp_path / "checkpoints"
    saver = Saver(folder, keep=1, engine=alone())
    saver.save(state_of(model, optimizer), step=1, state={})
    saver.wait()
    (folder / "step-00000002").write_text("in the way")
    saver.save(state_of(model, optimizer), step=2, state={})
    with pytest.raises(ResourceError, match=r"cannot write: File exists"):
        saver.save(state_of(model, optimizer), step=3, state={})
    assert not saver.failed
    saver.wait()
    assert [path.name for path in checkpoints._complete(folder)] == ["step-00000001"]


def test_no_room_for_a_copy_is_no_error(tmp_path, source, domains, unstopped, monkeypatch):
    """Then the loop waits until the checkpoint is written."""
    monkeypatch.setattr(saving, "available_memory", lambda: 0)
    monkeypatch.setattr(saving, "Thread", None)
    assert pretrain(source, CONFIG, domains=domains, out=tmp_path / "out").steps == 12
    assert contents(tmp_path / "out") == unstopped


KILLED = """
import os, signal, sys, threading
from prismoe.train.pretrain import pretrain
from tests.test_resume import CONFIG
source, out, first, second = sys.argv[1:]
seen, sync = threading.Event(), os.fsync
def progress(what, done, total):
    if what.startswith("train step") and done == 11:
        seen.set()
        threading.Event().wait(60)  # killed here, with the checkpoint of step 10 half-written
def fsync(descriptor):
    if threading.current_thread().name == "checkpoint" and os.path.isdir(out + "/checkpoints/step-00000010"):
        assert seen.wait(60)
        os.kill(os.getpid(), signal.SIGKILL)
    return sync(descriptor)
os.fsync = fsync
pretrain(source, CONFIG, domains=[first, second], out=out, on_progress=progress)
"""


def test_killed_while_a_checkpoint_is_written(tmp_path, source, domains, unstopped):
    """Step 11 is trained before the checkpoint of step 10 is on the disk; that of step 5 is what counts then."""
    out, root = tmp_path / "out", Path(__file__).resolve().parent.parent
    arguments = [sys.executable, "-c", KILLED, str(source), str(out), *map(str, domains)]
    child = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert (out / "checkpoints" / "step-00000010").is_dir()
    assert [path.name for path in checkpoints._complete(out / "checkpoints")] == ["step-00000005"]
    trained = pretrain(source, CONFIG, domains=domains, out=out)
    assert trained.resumed_from == 5
    assert contents(out) == unstopped
    assert not (out / "checkpoints").exists()
