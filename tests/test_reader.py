"""Documents out of files: every format alike, damage and hostile compression named by file and line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest
import zstandard

from prismoe.data import blocks
from prismoe.data.reader import read_documents
from prismoe.errors import InputError
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
