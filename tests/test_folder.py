"""Folders: nothing half-written, one owner at a time, a manifest that tells the truth."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prismoe.errors import InputError, ResourceError
from prismoe.folder import (
    Manifest,
    check_once,
    claim,
    hash_files,
    read_mark,
    sha256_file,
    unchecked,
    write_atomic,
    write_json_atomic,
    write_mark,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert names(tmp_path) == ["a.bin"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.bin"
    write_atomic(path, b"old")

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ResourceError) as caught:
        write_atomic(path, b"new")
    said = str(caught.value)
    assert said.startswith(f"{path}: cannot write: No space left on device, ")
    assert "of disk free; needed 3 bytes (hint:" in said
    assert caught.value.exit_code == 4
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_equal_objects_give_equal_bytes_and_nan_is_refused(tmp_path: Path) -> None:
    write_json_atomic(tmp_path / "a.json", {"b": 1, "a": "ü"})
    write_json_atomic(tmp_path / "b.json", {"a": "ü", "b": 1})
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"a": "ü", "b": 1}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(tmp_path / "c.json", {"a": float("nan")})


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def manifest(folder: Path) -> Manifest:
    (folder / "a.bin").write_bytes(b"abc")
    return Manifest(kind="convert", key="k", parents={"source": "f"}, config={}, files=hash_files(folder, ["a.bin"]))


def test_manifest_round_trip_and_check(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    made = manifest(tmp_path)
    made.write(tmp_path)
    assert Manifest.read(tmp_path) == made
    assert made.same_work("convert", "k")
    assert not made.same_work("convert", "other")
    assert made.versions["python"].startswith("3.")
    made.check(tmp_path)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda path: path.write_bytes(b"abd"), "sha256 a52d159f262b… differs from the manifest's ba7816bf8f01… "),
        (lambda path: path.write_bytes(b"ab"), "2 bytes; needed 3 (manifest.json)"),
        (lambda path: path.unlink(), "listed in the manifest but missing"),
    ],
)
def test_manifest_sees_every_change(tmp_path: Path, damage, line: str) -> None:  # type: ignore[no-untyped-def]
    made = manifest(tmp_path)
    damage(tmp_path / "a.bin")
    with pytest.raises(InputError) as caught:
        made.check(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'a.bin'}: {line}")


REST = '"kind":"a","key":"","config":{},"versions":{}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "not valid JSON (Expecting value: line 1 column 1 (char 0))"),
        ("[]", "JSON list; needed an object"),
        ("{}", "not a readable manifest (Manifest.__init__() missing 4 required positional arguments"),
        ('{"kind": 1', "not valid JSON (Expecting ',' delimiter: line 1 column 11 (char 10))"),
        ('{"kind":"a","surprise":1}', "not a readable manifest (Manifest.__init__() got an unexpected keyword"),
        ('{"kind":"a","kind":"b"}', "key 'kind' appears twice"),
        (f'{{{REST},"parents":[],"files":{{}}}}', "not a readable manifest (parents is not a map of strings)"),
        (f'{{{REST},"parents":{{}},"files":[]}}', "not a readable manifest (files is not a map)"),
        (f'{{{REST},"parents":{{}},"files":{{"a":1}}}}', "not a readable manifest ('a' has not sha256 and bytes)"),
        (
            f'{{{REST},"parents":{{}},"files":{{"../a":{{"sha256":"","bytes":1}}}}}}',
            "not a readable manifest ('../a' is not a name in the folder)",
        ),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, text: str, line: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError) as caught:
        Manifest.read(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'}: {line}")


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    manifest(tmp_path).write(tmp_path)
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    assert Manifest.ours(tmp_path) is not None
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"manifest\.json"):
            Manifest.ours(tmp_path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"manifest\.json"):
            Manifest.ours(tmp_path)
    path.write_bytes(whole[:100])
    with unchecked():
        assert Manifest.ours(tmp_path) is None
    path.write_text('{"manifest_version": 3, "name": "of something else"}')
    assert Manifest.ours(tmp_path) is None


def test_every_bit_of_the_mark_counts(tmp_path: Path) -> None:
    manifest(tmp_path).write(tmp_path)
    write_mark(tmp_path, "convert", "1")
    path = tmp_path / "prismoe.json"
    whole = path.read_bytes()
    assert (read_mark(tmp_path), Manifest.read(tmp_path) is None) == (("convert", "1"), False)
    broken = [whole[:length] for length in range(len(whole))]
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        broken.append(bytes(damaged))
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"prismoe\.json"):
            Manifest.read(tmp_path)
    with unchecked():
        assert Manifest.read(tmp_path) is not None
    path.write_text('{\n  "key": "1",\n  "kind": "convert"\n}\n')  # as earlier versions wrote it
    assert read_mark(tmp_path) == ("convert", "1")
    path.unlink()
    assert read_mark(tmp_path) is None


def test_files_are_hashed_before_they_are_read_once_each(tmp_path: Path) -> None:
    manifest(tmp_path).write(tmp_path)
    path = tmp_path / "a.bin"
    check_once(tmp_path)
    path.write_bytes(b"abd")
    with pytest.raises(InputError, match=r"a\.bin: sha256 .*--no-verify"):
        check_once(tmp_path)
    with unchecked():
        check_once(tmp_path)
    check_once(tmp_path, ["not listed"])
    check_once(tmp_path / "none")


def test_claim_marks_continues_and_refuses(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with claim(out, kind="convert", key="1"):
        (out / "half").write_text("x")
        (out / ".left.123.partial").write_text("x")
    assert not (out / ".prismoe.lock").exists()
    with claim(out, kind="convert", key="1"):
        assert names(out) == [".prismoe.lock", "half", "prismoe.json"]
    with pytest.raises(ResourceError) as caught, claim(out, kind="convert", key="2"):
        pass
    assert str(caught.value) == (
        f"{out}: output folder holds a different job (hint: --force replaces it, or choose another --out)"
    )
    with pytest.raises(ResourceError, match="holds the output of 'convert'"), claim(out, kind="pretrain", key="1"):
        pass
    with claim(out, kind="convert", key="2", force=True):
        assert not (out / "half").exists()


def test_claim_never_takes_a_folder_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for force in (False, True):
        with pytest.raises(ResourceError) as caught, claim(tmp_path, kind="convert", key="1", force=force):
            pass
        assert str(caught.value) == (
            f"{tmp_path}: output folder holds something else (thesis.tex) "
            "(hint: choose an empty or new folder with --out)"
        )
    assert names(tmp_path) == ["thesis.tex"]


def test_claim_of_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ResourceError, match="cannot make the output folder"),
        claim(tmp_path / "file", kind="convert", key="1"),
    ):
        pass


HOLD = """
import sys, time
from pathlib import Path
from prismoe.folder import claim
with claim(Path(sys.argv[1]), kind="convert", key="1"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_leaves_at_once_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ResourceError) as caught, claim(out, kind="convert", key="1"):
            pass
        assert str(caught.value) == (
            f"{out}: output folder is in use by process {holder.pid} (hint: wait for it, or choose another --out)"
        )
        holder.kill()
    with claim(out, kind="convert", key="1"):
        assert (out / "prismoe.json").exists()
