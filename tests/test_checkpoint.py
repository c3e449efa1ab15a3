"""The checkpoint reader: agrees with the safetensors library on good files, refuses every bad one in one line."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import header_bytes, read_header
from prismoe.errors import InputError
from prismoe.plan import make_plan
from tests.handmade import CONFIG, SIDE, handmade, weights
from tests.tiny import tiny_dense


@pytest.mark.parametrize("shards", [1, 3])
def test_reads_every_bit(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint.open(handmade(tmp_path, shards=shards))
    expected = weights()
    assert set(checkpoint.tensors) == set(expected)
    for key, value in expected.items():
        found = checkpoint.array(key)
        assert found.dtype == value.dtype
        assert found.shape == value.shape
        assert found.tobytes() == value.tobytes()
    ffn = checkpoint.ffn(1)
    assert ffn.down_DF.tobytes() == expected["model.layers.1.mlp.down_proj.weight"].tobytes()
    assert ffn.gate_FD.shape == (48, 16)
    assert [path.name for path in checkpoint.side_files] == sorted(SIDE)
    assert checkpoint.has_weights
    assert Checkpoint.open(checkpoint) is checkpoint


def test_views_cannot_be_written(tmp_path: Path) -> None:
    array = Checkpoint.open(handmade(tmp_path)).array("model.norm.weight")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_agrees_with_the_safetensors_library_on_real_files(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    checkpoint = Checkpoint.open(folder)
    with safe_open(folder / "model.safetensors", "numpy") as reference:
        assert set(reference.keys()) == set(checkpoint.tensors)
        for key in reference.keys():  # noqa: SIM118 - safe_open is not a mapping
            assert np.array_equal(reference.get_tensor(key), checkpoint.array(key))
    assert checkpoint.family.num_layers == 5


def test_a_config_alone_is_enough_for_planning(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    checkpoint = Checkpoint.open(tmp_path)
    assert not checkpoint.has_weights
    assert checkpoint.family.intermediate_size == 48
    with pytest.raises(InputError, match="no tensor 'model"):
        checkpoint.array("model.norm.weight")


def test_fingerprint_tells_configs_shapes_and_trainings_apart(tmp_path: Path) -> None:
    same = [Checkpoint.open(handmade(tmp_path / name)).fingerprint for name in ("a", "b")]
    other = {
        Checkpoint.open(handmade(tmp_path / "c", tensors=weights(seed=1))).fingerprint,
        Checkpoint.open(handmade(tmp_path / "d", rms_norm_eps=1e-6)).fingerprint,
        Checkpoint.open(handmade(tmp_path / "e", shards=2)).fingerprint,
    }
    assert same[0] == same[1]
    assert len(other | set(same)) == 4


def _config(**change: Any) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(json.dumps({**CONFIG, **change})) and None


def _index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return damage


def _rename_weights(folder: Path) -> None:
    for path in [*folder.glob("model*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK")


def _truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


SHARD = "{at}/model-00002-of-00003.safetensors"
INDEX = "{at}/model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (
            _config(auto_map={"AutoModel": "evil.Model"}),
            "{at}/config.json: auto_map: auto_map asks to run code from the folder (hint: use a checkpoint of a stock "
            "architecture; remove the key only if the model code is stock)",
        ),
        (
            _config(quantization_config={"quant_method": "gptq"}),
            "{at}/config.json: quantization_config: weights are quantised (gptq); needed float32, bfloat16 or float16 "
            "weights (hint: convert the original checkpoint)",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"a": 1, "a": 2}'),
            "{at}/config.json: key 'a' appears twice",
        ),
        (lambda folder: (folder / "config.json").write_text('{"a": NaN}'), "{at}/config.json: NaN is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "{at}/config.json: JSON list; needed an object"),
        (
            lambda folder: (folder / "config.json").unlink(),
            "{at}: no config.json; needed a Hugging Face checkpoint folder",
        ),
        (
            _rename_weights,
            "{at}: only pickle weights (pytorch_model.bin); needed safetensors "
            "(hint: a pickle can run code; save the model again with safe_serialization)",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").unlink(),
            "{at}: model-00001-of-00003.safetensors but no model.safetensors.index.json; "
            "needed model.safetensors or model.safetensors.index.json",
        ),
        (
            lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(),
            f"{INDEX}: shard model-00002-of-00003.safetensors is missing (hint: fetch the checkpoint again)",
        ),
        (
            lambda folder: (folder / "model-00004-of-00004.safetensors").write_bytes(b"x"),
            f"{INDEX}: shard model-00004-of-00004.safetensors is not in the index",
        ),
        (
            _index(lambda names: names.update({"ghost.weight": "model-00001-of-00003.safetensors"})),
            f"{INDEX}: ghost.weight: is in the index but not in model-00001-of-00003.safetensors",
        ),
        (
            _index(lambda names: names.pop("model.norm.weight")),
            f"{INDEX}: model.norm.weight: is in model-00003-of-00003.safetensors but the index says nothing",
        ),
        (
            _index(lambda names: names.update({"lm_head.weight": "../../etc/passwd"})),
            f"{INDEX}: lm_head.weight: shard name '../../etc/passwd'; needed a plain file name *.safetensors",
        ),
        (
            _index(lambda names: names.update({"lm_head.weight": "/model.safetensors"})),
            f"{INDEX}: lm_head.weight: shard name '/model.safetensors'; needed a plain file name *.safetensors",
        ),
    ],
)
def test_refused_in_one_line(tmp_path: Path, damage: Callable[[Path], Any], line: str) -> None:
    damage(handmade(tmp_path, shards=3))
    with pytest.raises(InputError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value) == line.format(at=tmp_path)
    assert caught.value.exit_code == 3


def test_a_truncated_shard_names_the_sizes(tmp_path: Path) -> None:
    _truncate(handmade(tmp_path, shards=3))
    size = (tmp_path / "model-00002-of-00003.safetensors").stat().st_size
    with pytest.raises(InputError) as caught:
        Checkpoint.open(tmp_path)
    assert str(caught.value) == SHARD.format(at=tmp_path) + (
        f": {size} bytes; needed {size + 10} for its tensors (hint: the file is truncated or has a tail)"
    )


def test_a_link_out_of_the_folder_is_refused_but_the_hub_cache_is_not(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = handmade(tmp_path / "model")
    (folder / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"tokenizer_config.json: is a link to .*secret.json"):
        _ = Checkpoint.open(folder).side_files
    cache = tmp_path / "models--owner--name"
    handmade(cache / "blobs")
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert len(Checkpoint.open(snapshot).side_files) == 3


def test_quantised_dtype_is_refused(tmp_path: Path) -> None:
    tensors = weights()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    with pytest.raises(InputError) as caught:
        Checkpoint.open(handmade(tmp_path, tensors=tensors))
    line = f"{tmp_path}/model.safetensors: model.norm.weight: dtype I8; needed F32 or F16 or BF16 or F64"
    assert str(caught.value) == line


def test_offline_opens_no_socket(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_socket(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as caught:
        Checkpoint.open("owner/no-such-model", offline=True)
    assert str(caught.value) == (
        "owner/no-such-model: no such folder, and not in the hub cache (hint: give a local checkpoint folder)"
    )


@pytest.mark.parametrize("source", ["../nowhere", "/no/such/folder", "a/b/c"])
def test_a_path_is_not_taken_for_a_hub_name(source: str) -> None:
    with pytest.raises(InputError) as caught:
        Checkpoint.open(source)
    assert str(caught.value) == f"{source}: no such folder; needed a checkpoint folder or a hub name"


def raw(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F32", shape: str = "[2]", offsets: str = "[0,8]", extra: str = "") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}{extra}}}'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", ": 0 bytes; needed a safetensors file"),
        (raw("{}", length=200_000_000), ": header of 200000000 bytes in a file of 10"),
        (raw("{}", length=2**63), f": header of {2**63} bytes in a file of 10"),
        (raw("{'a'"), ": not valid JSON"),
        (raw(b"\xff\xfe"), ": not valid JSON"),
        (raw("[" * 100_000), ": not valid JSON"),
        (raw(f'{{"a":{entry()},"a":{entry()}}}', bytes(8)), ": key 'a' appears twice"),
        (raw(f'{{"a":{entry(dtype="F9")}}}', bytes(8)), ": a: dtype 'F9'; needed one of BOOL"),
        (raw(f'{{"a":{entry(shape="[3]")}}}', bytes(8)), ": a: 8 bytes; needed 12 for F32 [3]"),
        (raw(f'{{"a":{entry(shape="[-2]")}}}', bytes(8)), ": a: shape or data_offsets are not whole numbers"),
        (raw(f'{{"a":{entry(shape="[true,2]")}}}', bytes(8)), ": a: shape or data_offsets are not whole numbers"),
        (raw(f'{{"a":{entry(offsets="[0,8,9]")}}}', bytes(8)), ": a: shape or data_offsets are not whole numbers"),
        (raw(f'{{"a":{entry(offsets="[8,16]")}}}', bytes(16)), ": a: data leaves a gap before it"),
        (raw(f'{{"a":{entry()},"b":{entry(offsets="[4,12]")}}}', bytes(12)), ": b: data overlaps another tensor"),
        (raw(f'{{"a":{entry()}}}', bytes(7)), ": 69 bytes; needed 70 for its tensors"),
        (raw(f'{{"a":{entry()}}}', bytes(9)), ": 71 bytes; needed 70 for its tensors"),
        (raw('{"a":{"dtype":"F32"}}'), ": a: header entry is damaged"),
        (raw('{"__metadata__":{"a":1}}'), ": __metadata__ is not a map of strings"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes, line: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}{line}")
    assert "\n" not in str(caught.value)


def test_header_round_trip_with_the_library(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(5, ml_dtypes.bfloat16)}
    head = header_bytes(
        [("b", "F32", (2, 3)), ("a", "BF16", (5,)), ("empty", "F16", (0, 4))], metadata={"format": "pt"}, align=64
    )
    assert len(head) % 64 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(head + arrays["b"].tobytes() + arrays["a"].tobytes())
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt"}
    assert [(name, info.shape) for name, info in tensors.items()] == [("b", (2, 3)), ("a", (5,)), ("empty", (0, 4))]
    with safe_open(path, "numpy") as reference:
        assert np.array_equal(reference.get_tensor("b"), arrays["b"])
        assert reference.get_tensor("empty").shape == (0, 4)
    save_file(arrays, tmp_path / "y.safetensors")
    assert {name: info.shape for name, info in read_header(tmp_path / "y.safetensors")[0].items()} == {
        "b": (2, 3),
        "a": (5,),
    }


def test_a_dtype_that_the_config_does_not_name_is_the_tensors(tmp_path: Path) -> None:
    source = tiny_dense(tmp_path / "dense", "llama", dtype="bfloat16")
    config = json.loads((source / "config.json").read_text())
    named = Checkpoint.open(source).family.dtype
    (source / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")})
    )
    assert named == Checkpoint.open(source).family.dtype == "bfloat16"


def test_a_config_that_is_not_the_weights_is_refused_before_planning(tmp_path: Path) -> None:
    handmade(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 2**31 - 1}))
    with pytest.raises(InputError, match=r"lm_head\.weight: shape \[32, 16\]; needed \[2147483647, 16\]|embed_tokens"):
        make_plan(tmp_path, num_experts=4)
