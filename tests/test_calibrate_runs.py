"""A calibration as work: the same bytes however it is stopped and cut, and one line for whatever is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prismoe.calibrate import CalibrateConfig, calibrate
from prismoe.calibrate.states import States
from prismoe.data.shards import Domain
from prismoe.errors import InputError, NumericalError, ResourceError, UsageError
from prismoe.folder import unchecked
from prismoe.stats.calibration import Calibration
from tests.calibration import EVERYTHING, SMALL, World, close, make_world
from tests.tiny import tiny_dense
from tests.training import domain_folder


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def same_files(left: Path, right: Path) -> None:
    names = sorted(path.name for path in left.iterdir())
    assert names == sorted(path.name for path in right.iterdir())
    for name in names:
        assert (left / name).read_bytes() == (right / name).read_bytes(), name


def result_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_one_seed_gives_one_result_and_another_another(world: World, tmp_path: Path) -> None:
    world.run(tmp_path / "a")
    world.run(tmp_path / "b", save_seconds=0.0)
    same_files(tmp_path / "a", tmp_path / "b")
    world.run(tmp_path / "c", seed=1)
    assert (
        result_files(tmp_path / "c")["sequences.safetensors"] != result_files(tmp_path / "a")["sequences.safetensors"]
    )


@pytest.mark.parametrize("quantities", [EVERYTHING, ("activation", "marks", "coactivation", "inputs", "output")])
@pytest.mark.parametrize("window", [1, 2])
def test_windows_of_layers_change_no_bit(
    world: World, tmp_path: Path, quantities: tuple[str, ...], window: int
) -> None:
    world.run(tmp_path / "whole", quantities=quantities)
    world.run(tmp_path / "window", quantities=quantities, layers_at_once=window)
    assert result_files(tmp_path / "whole") == result_files(tmp_path / "window")
    assert not (tmp_path / "window" / "scratch").exists()


class Stopped(Exception):
    """The test pulls the plug."""


@pytest.mark.parametrize("window", [0, 2])
def test_a_stopped_run_goes_on_and_gives_the_same_bytes(world: World, tmp_path: Path, window: int) -> None:
    world.run(tmp_path / "unstopped", layers_at_once=window)
    total = 0

    def count(what: str, done: int, of: int) -> None:
        nonlocal total
        total = of

    world.run(tmp_path / "counted", layers_at_once=window, on_progress=count)
    seen: list[int] = []

    def stop(what: str, done: int, of: int) -> None:
        seen.append(done)
        if len(seen) % 3 == 0:  # the batch is done, but not saved yet: it is done again
            raise Stopped

    for _ in range(total):
        try:
            found = world.run(tmp_path / "stopped", layers_at_once=window, on_progress=stop, save_seconds=0.0)
            break
        except Stopped:
            continue
    assert found.state == "written"
    assert len(seen) > total
    assert len(seen) <= total * 3 / 2 + 1, "finished batches were done again"
    same_files(tmp_path / "unstopped", tmp_path / "stopped")
    again = world.run(tmp_path / "stopped", layers_at_once=window, on_progress=stop)
    assert again.state == "already complete"


def test_a_killed_process_leaves_nothing_that_looks_complete(world: World, tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from prismoe.calibrate import CalibrateConfig, calibrate
def stop(what, done, total):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
calibrate({str(world.model)!r}, CalibrateConfig(**{ {**SMALL, "save_seconds": 0.0}!r}),
          out={str(tmp_path / "out")!r}, domains={[str(domain.folder) for domain in world.domains]!r}, on_progress=stop)
"""
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, env=dict(os.environ))
    assert done.returncode == -9, done.stderr.decode()
    with pytest.raises(InputError, match="not a finished calibration"):
        Calibration.open(tmp_path / "out")
    world.run(tmp_path / "out", save_seconds=0.0)
    world.run(tmp_path / "whole")
    same_files(tmp_path / "out", tmp_path / "whole")


def test_scratch_that_came_back_is_taken_away(world: World, tmp_path: Path) -> None:
    """A machine that goes down right after the manifest may find the folder again that was just removed."""
    world.run(tmp_path / "out")
    (tmp_path / "out" / "scratch").mkdir()
    (tmp_path / "out" / "scratch" / "inputs-00000.bin").write_bytes(b"large")
    assert world.run(tmp_path / "out").state == "already complete"
    assert not (tmp_path / "out" / "scratch").exists()


def test_scratch_that_was_taken_away_is_an_error(world: World, tmp_path: Path) -> None:
    def stop(what: str, done: int, of: int) -> None:
        if done == 3:
            raise Stopped

    with pytest.raises(Stopped):
        world.run(tmp_path / "out", save_seconds=0.0, on_progress=stop)
    (tmp_path / "out" / "scratch" / "importance-00001.bin").unlink()
    with pytest.raises(InputError, match=r"importance-00001\.bin: scratch file is gone or cut; needed \d+ bytes, as"):
        world.run(tmp_path / "out")
    with pytest.raises(InputError, match=r"hidden: scratch file is gone or cut; needed 96 bytes, as .*--force"):
        States(tmp_path / "hidden", shape=(2, 3, 4), dtype=torch.float32, made=True)
    assert world.run(tmp_path / "out", force=True).state == "written"


def test_the_batch_size_changes_no_more_than_rounding(world: World, tmp_path: Path) -> None:
    one, many = world.run(tmp_path / "one", batch_size=1), world.run(tmp_path / "many", batch_size=16)
    for layer in range(one.num_layers):
        left, right = one.layer(layer), many.layer(layer)
        for name in ("mean", "mean_abs", "mean_square", "importance", "inputs"):
            close(getattr(right, name), getattr(left, name), limit=1e-5)


def test_dry_run_says_what_is_needed_and_writes_nothing(world: World, tmp_path: Path) -> None:
    config = CalibrateConfig(**SMALL)
    planned = calibrate(world.model, config, domains=world.domains, out=tmp_path / "out", dry_run=True)
    assert (planned.state, planned.num_sequences, planned.num_tokens) == ("dry run", 20, 480)
    assert not (tmp_path / "out").exists()
    written = world.run(tmp_path / "out")
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("layer-*"))
    assert size <= planned.disk_bytes
    assert written.memory_bytes == planned.memory_bytes


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"clusters": 21}, UsageError, "calibrate.clusters: 20 sequences for 21 data clusters; needed"),
        ({"max_tokens": 24 * 2, "clusters": 1}, UsageError, "domain github: no sequence of 24 among 48 tokens"),
        ({"seq_len": 5000}, InputError, "config.json: 256 positions; needed seq_len 5000"),
        ({"seq_len": 1}, UsageError, "calibrate.seq_len: 1; needed at least 2"),
        ({"marks_per_token": 97}, UsageError, "calibrate.marks_per_token: 97 marks a token among 96 neurons"),
        ({"device": "cuda"}, UsageError, "calibrate.device: no cuda here; needed auto or cpu"),
        ({"weights": {"arxiv": 1.0}}, UsageError, "weights: no weight for books, github"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    world: World, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        world.run(tmp_path / "out", **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantities": ("importanse",)}, "did you mean importance?"),
        ({"quantities": ()}, "no quantities; needed some of activation"),
        ({"clusters": "topics"}, "calibrate.clusters: 'topics'"),
        ({"importance": "l2"}, "calibrate.importance: 'l2'"),
        ({"max_tokens": 0}, "calibrate.max_tokens: 0"),
        ({"device": "tpu"}, "calibrate.device: 'tpu'"),
    ],
)
def test_settings_are_checked_when_they_are_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        CalibrateConfig(**settings)
    assert message in str(caught.value)


def test_text_that_is_all_the_same_has_no_clusters(tmp_path: Path) -> None:
    model = tiny_dense(tmp_path / "model")
    domain = domain_folder(tmp_path / "same", tokenizer=model / "tokenizer.json")
    tokens = np.memmap(domain / "train.tokens", "<u2", mode="r+")
    tokens[:] = 5
    tokens.flush()
    world = World(model, (Domain.open(domain),))
    with (
        unchecked(),
        pytest.raises(InputError, match=r"clusters: 1 different sequences, so a cluster would be without tokens"),
    ):
        world.run(tmp_path / "out")


def test_numbers_that_overflow_are_named_by_layer(tmp_path: Path) -> None:
    """Weights that are finite themselves; those that are not are refused before (tests/test_finite.py)."""
    from safetensors.numpy import load_file, save_file

    world = make_world(tmp_path)
    path = world.model / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.down_proj.weight"][3] = 3e38
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="calibrate: loss is not finite"):
        world.run(tmp_path / "out", quantities=("importance",))
    with pytest.raises(NumericalError, match="layer 2: output is not finite"):
        world.run(tmp_path / "out1")
    weights["model.layers.2.mlp.down_proj.weight"][3] = 0
    weights["model.layers.1.mlp.up_proj.weight"][3] = 3e38
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="layer 1: mean is not finite"):
        world.run(tmp_path / "out2", quantities=("activation",))


def test_an_output_folder_of_something_else_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("private")
    with pytest.raises(ResourceError, match="holds something else"):
        world.run(tmp_path / "mine", force=True)
    world.run(tmp_path / "out", quantities=("marks",), clusters=1)
    with pytest.raises(ResourceError, match="a different job"):
        world.run(tmp_path / "out", quantities=("activation",), clusters=1)


def test_a_damaged_result_is_refused(world: World, tmp_path: Path) -> None:
    found = world.run(tmp_path / "out")
    path = tmp_path / "out" / "layer-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=r"layer-00001.safetensors: \d+ bytes; needed \d+ bytes"):
        Calibration.open(tmp_path / "out")
    path.write_bytes((tmp_path / "out" / "layer-00000.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"layer-00001.safetensors: sha256 \w+… differs from the manifest's"):
        found.layer(1)
    with pytest.raises(InputError, match="no layer 3; needed 0 to 2"):
        found.layer(3)
