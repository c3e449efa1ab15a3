"""The rows that damage files can fail: what a reader may not do is seen, and damage that nobody notices is told."""

import json
import os
import random
import time
from pathlib import Path

import pytest

from prismoe.errors import InputError
from prismoe.folder import Manifest, check_once, hash_files
from tests.torture import guarded
from tests.torture.guarded import attempt, read
from tests.torture.mutate import broken_bytes, broken_json, broken_sealed
from tests.torture.rows.corruption import _case

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def refuse(text: str) -> None:
    raise InputError(text, where="a.json")


def endless() -> None:
    while True:
        time.process_time()


def test_what_a_reader_may_not_do_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarded, "SECONDS", 0.2)
    found = attempt(
        [
            lambda: read(lambda: refuse("damaged"), ["a.json"]),
            lambda: read(lambda: refuse("damaged"), ["b.json"]),
            lambda: read(lambda: refuse("x" * 5000), ["a.json"]),
            lambda: read(lambda: {}["key"], ["a.json"]),
            lambda: read(lambda: bytearray(3 << 30), ["a.json"]),
            lambda: read(endless, ["a.json"]),
            lambda: os._exit(3),
            lambda: read(lambda: None, ["a.json"]),
        ]
    )
    assert [found[index] for index in (0, 2, 7)] == [None, None, None]  # a long line is cut before it is shown
    assert str(found[1]).startswith("does not name the file: 'a.json: damaged")
    assert str(found[3]).startswith("KeyError: 'key'")
    assert str(found[4]).startswith("MemoryError")
    assert found[5:7] == ["more than 0.2 s of processor time", "the process ended with 3"]


def test_damage_that_nobody_notices_is_told(tmp_path: Path) -> None:
    (tmp_path / "listed").write_bytes(b"hashed")
    (tmp_path / "other").write_bytes(b"not hashed")
    Manifest(kind="test", parents={}, config={}, files=hash_files(tmp_path, ["listed"])).write(tmp_path)
    cases = [("listed", False), ("listed", True), ("other", False)]
    found = [_case(tmp_path, check_once, tmp_path / name, b"hashed", 13, cut=cut)() for name, cut in cases]
    assert found == [None, None, "not detected"]
    assert (tmp_path / "listed").read_bytes() == b"hashed"


def test_mutations_are_drawn_from_the_seed_and_change_something() -> None:
    value = {"a": [1, 2.5, "x"], "b": {"c": None}}
    text = json.dumps(value).encode()
    header = b'{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"sha256":"0"}}'
    sealed = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
    for breaks in (
        lambda draw: broken_json(value, draw),
        lambda draw: broken_bytes(text, draw),
        lambda draw: broken_sealed(sealed, draw),
    ):
        found = [breaks(random.Random(number)) for number in range(100)]
        assert found == [breaks(random.Random(number)) for number in range(100)]
        assert len(set(found)) > 60
