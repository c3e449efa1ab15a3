"""Documents out of files: every format alike, damage and hostile compression named by file and line."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from prismoe.data import blocks, reader
from prismoe.data.reader import BadDocument, read_documents
from prismoe.data.sources import DomainSource, resolve
from prismoe.errors import InputError, UsageError
from tests.text import TEXTS, jsonl


def test_every_format_reads_alike(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS).encode()
    two_frames = zstandard.compress(lines[:50]) + zstandard.compress(lines[50:])
    files = {
        "a.jsonl": lines,
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n").rstrip(b"\r\n"),  # BOM, CRLF, no last newline
        "c.jsonl": b"\n \n" + lines.replace(b"\n", b"\n\n"),
        "d.jsonl.zst": two_frames,
        "e.jsonl.gz": gzip.compress(lines[:60]) + gzip.compress(lines[60:]),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        found = list(read_documents(tmp_path / name))
        assert [document.text for document in found] == TEXTS, name
        assert [document.num_bytes for document in found] == [len(text.encode()) for text in TEXTS]
        assert found[-1].position == len(data)
    assert found[2].where == f"{tmp_path}/e.jsonl.gz:3"
    (tmp_path / "f.txt").write_text("\ufeffa whole\nfile", encoding="utf-8")
    assert [document.text for document in read_documents(tmp_path / "f.txt")] == ["a whole\nfile"]


def test_a_named_field_is_the_one_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "no", "body": "yes"}\n{"content": "no"}\n')
    documents = read_documents(path, field="body")
    assert next(documents).text == "yes"
    with pytest.raises(InputError, match=r"a\.jsonl:2: no field body \(fields: content\)"):
        next(documents)


def test_fields_within_fields_and_selection(tmp_path: Path) -> None:
    rows = [{"text": {"raw": f"t{i}"}, "meta": {"set": "ab"[i % 2], "n": i % 3}, "a.b": "flat"} for i in range(12)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table, row_group_size=5)
    for file in (path, table):
        select = {"meta.set": ("b",), "meta.n": ("0", "1")}
        found = list(read_documents(file, field="text.raw", select=select, labels=("meta.n",)))
        assert [(d.text, d.number, d.labels) for d in found] == [
            (f"t{i}", i, (str(i % 3),)) for i in range(12) if i % 2 and i % 3 < 2
        ]
        assert next(read_documents(file, field="a.b")).text == "flat"  # a name as it stands comes before a path
        assert [d.number for d in read_documents(file, field="text.raw", start=7)] == [7, 8, 9, 10, 11]
        assert found[-1].position == file.stat().st_size or file == table
    assert found[0].where == f"{table}:2"
    with pytest.raises(InputError, match=r"a\.jsonl:1: field meta\.set\.x|no field meta\.set\.x"):
        list(read_documents(path, field="text.raw", select={"meta.set.x": ("b",)}))
    with pytest.raises(InputError, match=r"a\.parquet: no column body \(columns: a\.b, meta, text\)"):
        list(read_documents(table, field="body"))


def test_bad_rows_of_a_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    values = pyarrow.array([b"good", b"\xff", None, "ä".encode()]).cast(pyarrow.binary())
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, values.buffers())  # as a careless writer does it
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    bad: list[BadDocument] = []
    assert [d.text for d in read_documents(tmp_path / "a.parquet", on_bad=bad.append)] == ["good", "ä"]
    assert [(error.number, error.reason) for error in bad] == [(1, "not UTF-8"), (2, "not text")]
    assert str(bad[0]).startswith(f"{tmp_path}/a.parquet:2: not UTF-8 (byte 0xff at offset 0)")
    data = (tmp_path / "a.parquet").read_bytes()
    for number, broken in enumerate((data[:-20], data[:4] + b"x" * 40 + data[44:], b"", b"no table at all")):
        path = tmp_path / f"broken{number}.parquet"
        path.write_bytes(broken)
        with pytest.raises(InputError, match=rf"broken{number}\.parquet: not a readable Parquet file"):
            list(read_documents(path))


def test_bad_documents_can_be_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "MAX_DOCUMENT", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'{"text": "0"}\n\xff\n{"text": 2}\n{"text": "'
        + b"x" * 300_000
        + b'"}\n{"body": ""}\n[]\n{"text": "\\ud800"}\n'
        b'{"text": NaN}\n{"text": "8"'
    )
    bad: list[BadDocument] = []
    assert [(d.text, d.number) for d in read_documents(path, on_bad=bad.append)] == [("0", 0)]
    assert [(error.number, error.reason) for error in bad] == [
        (1, "not UTF-8"),
        (2, "not text"),
        (3, "too long"),
        (4, "missing field"),
        (5, "not an object"),
        (6, "not a character"),
        (7, "not text"),
        (8, "invalid JSON"),
    ]
    assert [str(error).split(": ")[0] for error in bad] == [f"{path}:{n}" for n in range(2, 10)]
    monkeypatch.setattr(reader, "_quick_loads", json.loads)  # without orjson: the same documents, the same complaints
    again: list[BadDocument] = []
    assert [d.text for d in read_documents(path, on_bad=again.append)] == ["0"]
    assert list(map(str, again)) == list(map(str, bad))


def test_a_line_without_end_needs_no_memory(tmp_path: Path) -> None:
    """600 MB in one line (a sparse file), read in a process that may have 300 MB."""
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n')
        file.truncate(600 << 20)
        file.seek(0, os.SEEK_END)
        file.write(b'\n{"text": "b"}\n')
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from prismoe.data.reader import read_documents\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (300 << 20, 300 << 20))\n"
        "bad = []\n"
        "print([d.text for d in read_documents(Path(sys.argv[1]), on_bad=bad.append)], bad[0])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    found = subprocess.run([sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True)
    assert found.stdout.startswith(f"['a', 'b'] {path}:2: a document over 64 MiB"), found.stderr


def test_names_on_the_hub_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "datasets--someone--texts"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    for name in ("train/b.jsonl", "train/a.jsonl", "train/readme.md", "test/a.jsonl"):
        jsonl(cache / "snapshots" / "c0ffee" / name, TEXTS)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def files(pattern: str) -> list[str]:
        found = resolve("d", DomainSource((f"hf://datasets/someone/{pattern}",)), offline=True)["train"]
        return [path.relative_to(cache / "snapshots" / "c0ffee").as_posix() for path in found]

    assert files("texts/train/*.jsonl") == ["train/a.jsonl", "train/b.jsonl"]
    assert files("texts@main/test/a.jsonl") == ["test/a.jsonl"]
    with pytest.raises(InputError, match=r"domain d: no file hf://datasets/someone/texts/x\.jsonl"):
        files("texts/x.jsonl")
    with pytest.raises(
        InputError, match=r"hf://datasets/someone/other/x\.jsonl: cannot be had from the hub .*--offline"
    ):
        files("other/x.jsonl")
    with pytest.raises(UsageError, match="needed hf://datasets/OWNER/NAME/FILE or PATTERN"):
        files("nothing")


def test_line_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = jsonl(tmp_path / "a.jsonl", TEXTS * 3)
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(blocks, "_READ", size)
        assert [document.text for document in read_documents(path)] == TEXTS * 3


def test_damaged_and_hostile_compression(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(20_000))
    bomb = (b'{"text": "' + b"a" * 1000 + b'"}\n') * 70_000
    cases = {
        "cut.jsonl.zst": (zstandard.compress(lines)[:-100], "compressed file ends in the middle"),
        "cut.jsonl.gz": (gzip.compress(lines)[:-100], "compressed file ends in the middle"),
        "noise.jsonl.zst": (b"\x28\xb5\x2f\xfd" + os.urandom(100), "damaged compressed file"),
        "noise.jsonl.gz": (b"not gzip at all", "damaged compressed file"),
        "bomb.jsonl.zst": (zstandard.compress(bomb), "expands more than 200-fold"),
        "bomb.jsonl.gz": (gzip.compress(bomb), "expands more than 200-fold"),
        "line.jsonl": (b'{"text": ""}\n' + b"a" * (65 << 20), ":2: a document over 64 MiB"),
        "line.txt": (b"a" * (65 << 20), "a document over 64 MiB"),
    }
    for name, (data, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(InputError) as caught:
            for _ in read_documents(path):
                pass
        assert message in str(caught.value), name
        assert str(caught.value).startswith(str(path))
