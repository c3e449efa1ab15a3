"""Conversion: every byte of every output tensor against plain NumPy, receipts, and every way to refuse."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert, writer
from prismoe.errors import InputError, InterruptedRun, PrismoeError, ResourceError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import Plan, make_plan
from tests.handmade import HIDDEN, NEURONS, SIDE, handmade, weights
from tests.tiny import tiny_dense


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return handmade(tmp_path / "dense", shards=2)


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 4000])
@pytest.mark.parametrize("num_experts", [3, 4])  # width 16 padded to 32, width 12 padded to 32
def test_partition_bit_for_bit(dense: Path, tmp_path: Path, num_experts: int, max_shard_bytes: int) -> None:
    plan = make_plan(dense, num_experts=num_experts, scale=1.0)
    receipt = convert(dense, plan, out=tmp_path / "moe", max_shard_bytes=max_shard_bytes)
    source, made = weights(), Checkpoint.open(tmp_path / "moe")
    width, wide = NEURONS // num_experts, 32
    seen = set()
    for layer, layer_plan in enumerate(plan.layers):
        assert layer_plan is not None
        at, moe = f"model.layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        for expert, index in enumerate(layer_plan.experts):
            for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj")):
                key = f"{moe}.experts.{expert}.{ours}.weight"
                expected = np.zeros((wide, HIDDEN), ml_dtypes.bfloat16)
                expected[:width] = source[f"{at}.{theirs}.weight"][index]
                assert same_bits(made.array(key), expected)
                seen.add(key)
            key = f"{moe}.experts.{expert}.w2.weight"
            expected = np.zeros((HIDDEN, wide), ml_dtypes.bfloat16)
            expected[:, :width] = source[f"{at}.down_proj.weight"][:, index]
            assert same_bits(made.array(key), expected)
            seen.add(key)
        assert made.tensors[f"{moe}.gate.weight"].shape == (num_experts, HIDDEN)
        seen.add(f"{moe}.gate.weight")
    for key, value in source.items():
        if ".mlp." not in key:
            assert same_bits(made.array(key), value)
            seen.add(key)
    assert seen == set(made.tensors)
    assert receipt.state == "written"
    assert (receipt.num_shards == 1) == (max_shard_bytes > 4000)
    assert receipt.num_tensors == len(seen)
    assert receipt.dropped == ()
    json.dumps(receipt.to_dict())


@pytest.mark.parametrize("target", ["mixtral", "granitemoeshared"])
def test_upcycled_experts_are_the_dense_block(dense: Path, tmp_path: Path, target: str) -> None:
    plan = make_plan(dense, method="upcycle", num_experts=3)
    convert(dense, plan, target=target, out=tmp_path / "moe", pad_to=16)
    source, made = weights(), Checkpoint.open(tmp_path / "moe")
    gate, up, down = (source[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    moe = "model.layers.1.block_sparse_moe"
    if target == "mixtral":
        for expert in range(3):
            assert same_bits(made.array(f"{moe}.experts.{expert}.w1.weight"), gate)
            assert same_bits(made.array(f"{moe}.experts.{expert}.w3.weight"), up)
            assert same_bits(made.array(f"{moe}.experts.{expert}.w2.weight"), down)
    else:
        assert same_bits(made.array(f"{moe}.input_linear.weight"), np.stack([np.concatenate([gate, up])] * 3))
        assert same_bits(made.array(f"{moe}.output_linear.weight"), np.stack([down] * 3))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_a_factor_rounds_once(tmp_path: Path, dtype: str) -> None:
    tensors = {key: value.astype(dtype) for key, value in weights().items()}
    dense = handmade(tmp_path / "dense", tensors=tensors)
    plan = make_plan(dense, num_experts=3, scale=8 / 3)
    convert(dense, plan, out=tmp_path / "moe")
    layer = plan.layers[0]
    assert layer is not None
    wide = np.float64 if dtype == "float64" else np.float32
    down = tensors["model.layers.0.mlp.down_proj.weight"][:, layer.experts[2]].astype(wide)
    expected = (down * wide(8 / 3)).astype(dtype)
    found = Checkpoint.open(tmp_path / "moe").array("model.layers.0.block_sparse_moe.experts.2.w2.weight")
    assert same_bits(np.ascontiguousarray(found[:, :16]), expected)


def test_folder_is_complete_and_loads_in_the_library(dense: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    out = tmp_path / "moe"
    plan = make_plan(dense, num_experts=4)
    receipt = convert(dense, plan, out=out, max_shard_bytes=8000)
    for name, data in SIDE.items():
        assert (out / name).read_bytes() == data
    manifest = Manifest.read(out)
    assert manifest is not None
    manifest.check(out)
    assert manifest.files == receipt.files
    assert set(manifest.files) | {"manifest.json", "prismoe.json"} == set(contents(out))
    assert manifest.parents["source"] == Checkpoint.open(dense).fingerprint == plan.origin.source
    loaded = Plan.load(out / "moe.plan")
    assert np.array_equal(loaded.layers[1].experts, plan.layers[1].experts)  # type: ignore[union-attr]
    config = json.loads((out / "config.json").read_bytes())
    assert (config["model_type"], config["num_local_experts"], config["intermediate_size"]) == ("mixtral", 4, 32)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    sizes = 0
    for name in set(index["weight_map"].values()):
        with safe_open(out / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                assert index["weight_map"][key] == name
                sizes += file.get_tensor(key).nbytes
    assert index["metadata"]["total_size"] == sizes
    starts = [info.start % 64 for info in Checkpoint.open(out).tensors.values()]
    assert min(starts) == 0


def test_same_bytes_whatever_the_shard_threads_do(dense: Path, tmp_path: Path) -> None:
    plan = make_plan(dense, method="upcycle", num_experts=4)
    for name in ("a", "b"):
        convert(dense, plan, out=tmp_path / name, max_shard_bytes=3000)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_router_is_drawn_as_documented(dense: Path, tmp_path: Path) -> None:
    plan = make_plan(dense, method="upcycle", num_experts=4, seed=7)
    convert(dense, plan, out=tmp_path / "moe")
    found = Checkpoint.open(tmp_path / "moe").array("model.layers.1.block_sparse_moe.gate.weight")
    numbers = np.random.Generator(np.random.Philox(key=[7, 1])).standard_normal((4, HIDDEN)) * 0.02
    assert same_bits(found, numbers.astype(ml_dtypes.bfloat16))


def test_chunks_smaller_than_tensors_change_nothing(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(dense, num_experts=4)
    convert(dense, plan, out=tmp_path / "a")
    monkeypatch.setattr(writer, "CHUNK", 4096)
    monkeypatch.setattr(writer, "BUFFER_BYTES", 4096 * writer.DEPTH)
    convert(dense, plan, out=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_file_system_without_direct_writes(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    plan = make_plan(dense, num_experts=4)
    convert(dense, plan, out=tmp_path / "a")
    real_open, real_write, refused = os.open, os.pwrite, []

    def no_direct_open(path, flags, *rest, **named):  # type: ignore[no-untyped-def]
        if flags & writer.O_DIRECT:
            refused.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", no_direct_open)
    convert(dense, plan, out=tmp_path / "b")
    monkeypatch.setattr(os, "open", real_open)

    def no_direct_write(handle, data, offset):  # type: ignore[no-untyped-def]
        import fcntl

        if fcntl.fcntl(handle, fcntl.F_GETFL) & writer.O_DIRECT:
            refused.append("write")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", no_direct_write)
    convert(dense, plan, out=tmp_path / "c")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert "open" in refused


def test_dry_run_writes_nothing_and_tells_the_size(dense: Path, tmp_path: Path) -> None:
    plan = make_plan(dense, num_experts=4)
    receipt = convert(dense, plan, out=tmp_path / "moe", dry_run=True)
    assert not (tmp_path / "moe").exists()
    done = convert(dense, plan, out=tmp_path / "moe")
    assert (receipt.state, receipt.files) == ("dry run", {})
    assert receipt.total_bytes == done.total_bytes == (tmp_path / "moe" / "model.safetensors").stat().st_size
    assert receipt.memory_bytes < 250_000_000


def test_second_call_does_nothing_and_a_lost_file_is_made_again(dense: Path, tmp_path: Path) -> None:
    out, plan = tmp_path / "moe", make_plan(dense, num_experts=4)
    convert(dense, plan, out=out, max_shard_bytes=8000)
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != "prismoe.json"}
    assert convert(dense, plan, out=out, max_shard_bytes=8000).state == "already complete"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    max(out.glob("model-*.safetensors")).unlink()
    again = convert(dense, plan, out=out, max_shard_bytes=8000)
    assert (again.state, again.kept_shards) == ("written", again.num_shards - 1)
    assert contents(out) == before


def test_another_job_in_the_folder_is_refused_unless_forced(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    convert(dense, make_plan(dense, num_experts=4), out=out, max_shard_bytes=8000)
    other = make_plan(dense, num_experts=3)
    with pytest.raises(ResourceError, match="output folder holds a different job"):
        convert(dense, other, out=out)
    with pytest.raises(ResourceError, match="output folder holds something else"):
        convert(dense, other, out=dense)
    convert(dense, other, out=out, force=True)
    convert(dense, other, out=tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "key", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("method", ["random", "upcycle"])
def test_weights_that_are_not_finite(tmp_path: Path, key: str, value: float, method: str) -> None:
    tensors = weights()
    tensors[key].reshape(-1)[-1] = value
    dense = handmade(tmp_path / "dense", tensors=tensors)
    with pytest.raises(InputError) as caught:
        convert(dense, make_plan(dense, method=method, num_experts=4), out=tmp_path / "moe")
    line = str(caught.value)
    assert line.startswith(f"{dense}/model.safetensors: {key}: holds NaN or infinity")
    assert line.endswith("needed finite weights (hint: the checkpoint is damaged; fetch it again)")
    assert caught.value.exit_code == 3
    assert not (tmp_path / "moe" / "manifest.json").exists()


def test_a_factor_that_overflows(tmp_path: Path) -> None:
    tensors = {key: value.astype(np.float16) for key, value in weights().items()}
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = 60000
    dense = handmade(tmp_path / "dense", tensors=tensors)
    with pytest.raises(InputError, match=r"down_proj.weight: holds NaN or infinity \(after the factor 2\)"):
        convert(dense, make_plan(dense, num_experts=4), out=tmp_path / "moe")


def test_largest_finite_numbers_pass(tmp_path: Path) -> None:
    tensors = weights()
    top = ml_dtypes.finfo(ml_dtypes.bfloat16)
    tensors["lm_head.weight"][0, :2] = [top.max, top.min]
    tensors["model.norm.weight"][:2] = [np.finfo(np.float32).max, np.finfo(np.float32).min]
    dense = handmade(tmp_path / "dense", tensors=tensors)
    assert convert(dense, make_plan(dense, num_experts=4), out=tmp_path / "moe").state == "written"


def test_no_disk_and_no_memory_are_found_before_the_first_byte(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(dense, num_experts=4)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10_000))
    with pytest.raises(ResourceError) as caught:
        convert(dense, plan, out=tmp_path / "moe")
    line = f"{tmp_path}/moe: 10.0 kB of disk free; needed 1.1 MB (hint: free some space, or choose --out)"
    assert str(caught.value) == line
    assert caught.value.exit_code == 4
    monkeypatch.undo()
    monkeypatch.setattr("prismoe.room.available_memory", lambda: 1_000_000)
    with pytest.raises(ResourceError, match=r"1\.0 MB of memory available; needed about 134\.2 MB"):
        convert(dense, plan, out=tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_an_interrupt_stops_and_the_same_call_continues(dense: Path, tmp_path: Path) -> None:
    plan = make_plan(dense, num_experts=4)
    convert(dense, plan, out=tmp_path / "whole", max_shard_bytes=3000)

    def ctrl_c(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRun) as caught:
        convert(dense, plan, out=tmp_path / "moe", max_shard_bytes=3000, on_progress=ctrl_c)
    assert str(caught.value) == f"{tmp_path}/moe: stopped (hint: the same command continues)"
    assert caught.value.exit_code == 75
    assert not [path.name for path in (tmp_path / "moe").iterdir() if path.name.endswith(".partial")]
    receipt = convert(dense, plan, out=tmp_path / "moe", max_shard_bytes=3000)
    assert 0 < receipt.kept_shards < receipt.num_shards
    assert contents(tmp_path / "moe") == contents(tmp_path / "whole")


def test_progress_reaches_the_total(dense: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    receipt = convert(
        dense, make_plan(dense, num_experts=4), out=tmp_path / "moe", on_progress=lambda *now: told.append(now)
    )
    assert told[-1] == ("bytes written", receipt.total_bytes, receipt.total_bytes)


@pytest.mark.parametrize(
    ("options", "error", "line"),
    [
        ({"target": "mixtrol"}, UsageError, "target: unknown 'mixtrol'"),
        ({"pad_to": 0}, UsageError, "convert.pad_to: 0; needed 1 or more"),
        ({"max_shard_bytes": 0}, UsageError, "convert.max_shard_bytes: 0; needed a size in bytes above 0"),
    ],
)
def test_wrong_arguments(
    dense: Path, tmp_path: Path, options: dict[str, object], error: type[PrismoeError], line: str
) -> None:
    with pytest.raises(error) as caught:
        convert(dense, make_plan(dense, num_experts=4), out=tmp_path / "moe", **options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(line)
    assert not (tmp_path / "moe").exists()


def test_a_plan_made_for_another_checkpoint_is_refused(dense: Path, tmp_path: Path) -> None:
    """Same architecture, other weights; a plan made of config.json alone fits every checkpoint that has that config."""
    other = tiny_dense(tmp_path / "other", seed=9)
    with pytest.raises(InputError) as caught:
        convert(dense, make_plan(other, num_experts=4), out=tmp_path / "moe")
    made, here = (Checkpoint.open(folder).fingerprint[:12] for folder in (other, dense))
    needed = f"needed one made for {here}… (hint: run prismoe plan on it)"
    assert str(caught.value) == f"{dense}: a plan made for another checkpoint ({made}…); {needed}"
    assert not (tmp_path / "moe").exists()
    (tmp_path / "bare").mkdir()
    shutil.copy(dense / "config.json", tmp_path / "bare")
    assert convert(dense, make_plan(tmp_path / "bare", num_experts=4), out=tmp_path / "moe").state == "written"


def test_config_without_weights_is_not_enough(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    shutil.copy(dense / "config.json", tmp_path / "bare")
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "bare", make_plan(tmp_path / "bare", num_experts=4), out=tmp_path / "moe")
    assert str(caught.value) == f"{tmp_path}/bare: config.json without weights; needed model.safetensors"
