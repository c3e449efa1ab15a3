"""Domain folders: lengths are checked on opening, held-out windows score every token of text once."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.data.shards import SPLITS, Domain, heldout_windows
from prismoe.errors import InputError
from prismoe.folder import Manifest, unchecked
from tests.text import TEXTS, jsonl, one
from tests.tiny import tiny_tokenizer

FEW = settings(max_examples=25, deadline=None, database=None)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def domain(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path) -> Path:
    folder = tmp_path_factory.mktemp("domain")
    one(folder, tokenizer, jsonl(folder / "a.jsonl", TEXTS))
    return folder / "out" / "d"


def test_opening_a_domain(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(InputError, match="not a prepared domain"):
        Domain.open(tmp_path)
    one(tmp_path, tokenizer, jsonl(tmp_path / "a.jsonl", TEXTS))
    folder = tmp_path / "out" / "d"
    with (folder / "train-00000-000.tokens").open("ab") as file:
        file.write(b"\0\0")
    size = (folder / "train-00000-000.tokens").stat().st_size
    with pytest.raises(
        InputError, match=rf"train-00000-000\.tokens: {size} bytes; needed {size - 2} \(manifest\.json\)"
    ):
        Domain.open(folder)
    (folder / "train-00000-000.tokens").unlink()
    with pytest.raises(InputError, match=r"train-00000-000\.tokens: missing"):
        Domain.open(folder)


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("shard", "num_tokens", -1, "not a readable manifest .*-1 is not a count"),
        ("shard", "num_tokens", 1.0, r"not a readable manifest .*1\.0 is not a count"),
        ("shard", "num_documents", True, "not a readable manifest .*True is not a count"),
        ("shard", "num_tokens", 1 << 70, "not a readable manifest .* is not a count"),
        ("shard", "num_bytes", "12", "not a readable manifest .*'12' is not a count"),
        ("shard", "num_words", 1, "not a readable manifest .*num_words"),
        ("shard", "num_bytes", 1, "shards do not add up to num_bytes of train"),
        ("split", "num_documents", 1 << 40, "shards do not add up to num_documents of train"),
        ("both", "num_tokens", 1 << 40, r"train-00000-000\.tokens: \d+ bytes; needed 2199023255552"),
        ("both", "num_documents", 1 << 40, r"train\.ends: \d+ bytes; needed 17592186044416"),
        ("all", "vocab_size", 1 << 33, "not a readable manifest .* is not a count"),
        ("all", "end_token", -7, "not a readable manifest .*-7 is not a count"),
    ],
)
def test_counts_of_a_manifest_that_cannot_be(
    domain: Path, tmp_path: Path, where: str, name: str, value: Any, message: str
) -> None:
    """The manifest is whole by its own hash: what is wrong is what somebody wrote into it."""
    shutil.copytree(domain, tmp_path / "d")
    manifest = Manifest.read(domain)
    assert manifest is not None
    config = copy.deepcopy(manifest.config)
    if where == "all":
        config[name] = value
    if where in ("shard", "both"):
        config["shards"]["train"][0]["counts"][name] = value
    if where in ("split", "both"):
        config["splits"]["train"][name] = value
    replace(manifest, config=config).write(tmp_path / "d")
    with pytest.raises(InputError, match=message):
        Domain.open(tmp_path / "d")


def test_every_file_of_a_split_is_hashed_before_its_tokens_are_read(tmp_path: Path, tokenizer: Path) -> None:
    one(tmp_path, tokenizer, jsonl(tmp_path / "a.jsonl", TEXTS))
    folder = tmp_path / "out" / "d"
    files = [path for path in folder.iterdir() if path.name not in ("manifest.json", "prismoe.json")]
    assert {path.suffix for path in files} == {".tokens", ".ends", ".json"}
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(InputError, match=rf"{path.name}: sha256 "):
            [Domain.open(folder).tokens(split) for split in SPLITS]
        with unchecked():
            [Domain.open(folder).tokens(split) for split in SPLITS]
        path.write_bytes(whole)
    assert [len(Domain.open(folder).tokens(split)) > 0 for split in SPLITS] == [True, True]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=10),
    seq_len=st.integers(2, 20),
    max_tokens=st.one_of(st.none(), st.integers(1, 200)),
)
@FEW
def test_heldout_windows_score_every_token_of_text_once(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Path, lengths: list[int], seq_len: int, max_tokens: int | None
) -> None:
    folder = tmp_path_factory.mktemp("h")
    texts = ["ab " * length for length in lengths]
    heldout = jsonl(folder / "held.jsonl", texts)
    one(folder, tokenizer, jsonl(folder / "train.jsonl", TEXTS), heldout)
    domain = Domain.open(folder / "out" / "d")
    documents = [part[:-1].tolist() for part in np.split(domain.tokens("heldout"), domain.ends("heldout")[:-1, 0])]
    if max_tokens is not None:
        fitting = int((domain.ends("heldout")[:, 0] <= max_tokens).sum())
        documents = documents[: max(1, fitting)]
    windows = heldout_windows(domain, seq_len=seq_len, max_tokens=max_tokens)
    pieces = [d[i : i + seq_len - 1] for d in documents for i in range(0, len(d), seq_len - 1)]
    found = list(windows)
    assert len(found) == len(windows) == len(pieces)
    assert sorted(ids[1:].tolist() for ids, _ in found) == sorted(pieces)
    assert {int(ids[0]) for ids, _ in found} == {2}  # no start token in this template: the end of the document before
    assert all(labels.tolist() == [-100, *ids[1:].tolist()] for ids, labels in found)
    assert [len(ids) for ids, _ in found] == sorted((len(ids) for ids, _ in found), reverse=True)
    assert windows.num_tokens == sum(map(len, documents))
    assert (windows.num_documents, windows.num_bytes) == (len(documents), sum(3 * n for n in lengths[: len(documents)]))
