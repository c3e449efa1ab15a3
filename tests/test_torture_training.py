"""The rows of the torture that train: a difference is seen, and what is no difference is not."""

import json
import struct
from pathlib import Path

import pytest

from tests.torture.planted import Result
from tests.torture.rows import resume


def written(path: Path, metadata: dict[str, str], values: list[float]) -> Path:
    path.mkdir()
    data = struct.pack(f"<{len(values)}f", *values)
    entry = {"dtype": "F32", "shape": [len(values)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": metadata, "model.lm_head.weight": entry}).encode()
    (path / "shard.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    (path / "state.json").write_text("{}")
    (path / "manifest.json").write_text(f"hash of {metadata}")
    return path


def test_tensors_are_compared_and_not_the_order_of_the_keys_beside_them(tmp_path: Path) -> None:
    first = resume._state(written(tmp_path / "a", {"format": "pt", "version": "1"}, [1.0, 2.0]))
    assert first == resume._state(written(tmp_path / "b", {"version": "1", "format": "pt"}, [1.0, 2.0]))
    other = resume._state(written(tmp_path / "c", {"format": "pt", "version": "1"}, [1.0, 2.0000002]))
    assert {name for name in first if first[name] != other[name]} == {"shard.safetensors: model.lm_head.weight"}


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ({"event": "step", "changed": True, "finite": True}, None),
        ({"event": "skipped", "changed": False, "finite": True}, None),
        ({"event": "step", "changed": True, "finite": False}, "not finite after step 4"),
        ({"event": "skipped", "changed": True, "finite": True}, "the weights did change"),
        ({"event": "step", "changed": False, "finite": True}, "the weights did not change"),
    ],
)
def test_a_step_that_does_not_do_what_its_event_says_is_seen(line: dict[str, object], wrong: str | None) -> None:
    found = Result(0, "", None, {}, [{"step": 4, **line}], []).weights_wrong
    assert found is None if wrong is None else wrong in str(found)
