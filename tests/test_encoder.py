"""A faster way to encode is used only where it gives the ids of the tokenizers library."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from prismoe.data import encoder
from prismoe.data.bytelevel import ByteLevel
from prismoe.data.tokenizer import DocumentTokenizer
from tests.text import TEXTS, jsonl, one
from tests.tiny import TEXT

MANY = settings(max_examples=200, deadline=None, database=None)
texts = st.text(st.one_of(st.sampled_from("ab ▁\n\té😀<s>/"), st.characters(codec="utf-8")), max_size=60)


def llama2_like(folder: Path, *, across: bool = False) -> Path:
    """No split, byte fallback; with `across` entries that run over a space, as few vocabularies have."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if across:
        tokenizer.normalizer = normalizer
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.pre_tokenizer, tokenizer.normalizer = None, normalizer
    tokenizer.decoder = decoders.Metaspace()
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [{**token, "special": True} for token in described["added_tokens"][:3]]
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>"}')
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama2_like(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def both(model: Path) -> tuple[DocumentTokenizer, DocumentTokenizer]:
    opened = DocumentTokenizer.open(model)
    return opened, opened.quicker(list(TEXT))


def test_the_fastest_proved_way_is_taken(both: tuple[DocumentTokenizer, DocumentTokenizer]) -> None:
    opened, quick = both
    assert opened.encoder.name.startswith("tokenizers ")
    assert opened.encoder.proof == ""
    assert quick.encoder.name.endswith(", cut before ▁, as bytes")
    count = len(encoder._HOSTILE) + len(TEXT)
    assert quick.encoder.proof.startswith(f"ids equal {opened.encoder.name}'s on {count} texts, ")


@given(text=st.lists(texts, max_size=4))
@MANY
def test_ids_are_equal(both: tuple[DocumentTokenizer, DocumentTokenizer], text: list[str]) -> None:
    found, expected = both[1].encode(text), both[0].encode(text)
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_characters_that_begin_like_known_ones_become_bytes(model: Path) -> None:
    """▁ is E2 96 81: ▂ and ╁ share one or two bytes with it."""
    settings = json.loads((model / "tokenizer.json").read_text())
    spelled = ByteLevel.of({**settings, "pre_tokenizer": {"type": "Split"}})
    assert spelled is not None
    marks = [settings["model"]["vocab"][f"<0x{byte:02X}>"] for byte in (0xE2, 0x96)]
    begin = max(settings["model"]["vocab"].values()) + 1
    ids, lengths = spelled.expand(np.array([7, begin, 8, begin], np.uint32), np.array([0, 2, 2, 0]))
    assert (ids.tolist(), lengths.tolist()) == ([7, *marks, 8, *marks], [0, 3, 3, 0])
    opened = DocumentTokenizer.open(model)
    texts = ["▂", "a▂▂b ╁", "", "▁▂ \u2580▁", "\U0001f041x"]
    for found, own in zip(opened.quicker([]).encode(texts), opened.encode(texts), strict=True):
        assert found.tolist() == own.tolist()


def test_a_vocabulary_that_cannot_be_spelled_as_bytes(model: Path) -> None:
    settings = json.loads((model / "tokenizer.json").read_text()) | {"pre_tokenizer": {"type": "Split"}}
    described = settings["model"]
    assert ByteLevel.of(settings) is not None
    assert ByteLevel.of({**settings, "model": {**described, "byte_fallback": False}}) is None
    fewer = {token: number for token, number in described["vocab"].items() if token != "<0xC3>"}
    assert ByteLevel.of({**settings, "model": {**described, "vocab": fewer}}) is None
    plain = [{**token, "special": False} for token in settings["added_tokens"]]
    assert ByteLevel.of({**settings, "added_tokens": plain}) is None  # such marks would be found in any text
    built = [*described["merges"], ["<s", ">"]]
    assert ByteLevel.of({**settings, "model": {**described, "merges": built}}) is None


def test_without_the_extra_cutting_alone_is_proved(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    quick = DocumentTokenizer.open(model).quicker(list(TEXT))
    assert quick.encoder.name.startswith("tokenizers ")
    assert quick.encoder.name.endswith(", cut before ▁")


def test_no_cut_where_an_entry_runs_over_a_space(tmp_path: Path) -> None:
    folder = llama2_like(tmp_path / "m", across=True)
    assert any("e▁" in token for token in json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    assert "cut" not in DocumentTokenizer.open(folder).quicker(list(TEXT)).encoder.name


@pytest.mark.parametrize("wrong", ["ids", "lengths", "error"])
def test_a_wrong_encoder_is_not_used(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """One that is right everywhere but in a single document of the corpus, which the sample holds."""
    rare = "the king said: no one"

    def caching(description: str, own: encoder.Encoder) -> Any:
        def encode(texts: list[str]) -> encoder.Ids:
            ids, lengths = own.encode(texts)
            if rare in texts:
                if wrong == "error":
                    raise RuntimeError("a limit")
                ids = ids.copy() if wrong == "ids" else ids[:-1]
                lengths = lengths.copy()
                if wrong == "ids":
                    ids[-1] += 1
                else:
                    lengths[-1] -= 1
            return ids, lengths

        return encode

    monkeypatch.setattr(encoder, "_caching", caching)
    monkeypatch.setattr(encoder, "_cut_before_spaces", lambda settings: None)
    receipt = one(tmp_path, model, jsonl(tmp_path / "a.jsonl", [*TEXTS, rare]))
    assert receipt.encoder.startswith("tokenizers ")
    assert receipt.proof == ""
    assert one(tmp_path / "x", model, jsonl(tmp_path / "b.jsonl", TEXTS)).encoder.startswith("fastokens ")


def test_a_limit_of_the_fast_encoder_costs_time_only(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fastokens = pytest.importorskip("fastokens")
    quick = DocumentTokenizer.open(model).quicker([])
    expected = DocumentTokenizer.open(model).encode_flat(["a b", "c"])

    genuine = fastokens.Tokenizer

    class Limited:
        @staticmethod
        def from_json_str(description: str) -> Any:
            real = genuine.from_json_str(description)

            class Tokenizer:
                no_truncation, no_padding = real.no_truncation, real.no_padding

                @staticmethod
                def encode_batch_flat(texts: list[str], **more: Any) -> Any:
                    if texts == ["a b", "c"]:
                        raise RuntimeError("match limit exceeded")
                    return real.encode_batch_flat(texts, **more)

            return Tokenizer

    with monkeypatch.context() as patch:
        patch.setattr(fastokens, "Tokenizer", Limited)
        limited = DocumentTokenizer.open(model).quicker([])
    assert limited.encoder.name == quick.encoder.name
    for ids, own in zip(limited.encode_flat(["a b", "c"]), expected, strict=True):
        assert np.array_equal(ids, own)


@pytest.mark.parametrize("name", ["stories260K", "babyllama105", "parent-4m", "gpt-neox-tokenizer"])
def test_real_vocabularies(shared: Path, tmp_path: Path, name: str) -> None:
    from prismoe.data.reader import read_documents

    pytest.importorskip("fastokens")
    tokenizer = Tokenizer.from_file(str(shared / "models" / name / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    quick = encoder.fastest(shared / "models" / name / "tokenizer.json", tokenizer, [])
    assert quick.name.startswith("fastokens ")
    for domain in ("arxiv", "github", "c4"):
        documents = [d.text for d in read_documents(shared / "corpora" / domain / "heldout.jsonl.zst")][:15]
        for found, expected in zip(quick.encode(documents), encoder.plain(tokenizer).encode(documents), strict=True):
            assert np.array_equal(found, expected)
