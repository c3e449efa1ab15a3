"""prepare: every document's ids and nothing else on disk, whole or not at all; bad text is named by file and line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.data.mixture import Mixture
from prismoe.data.prepare import DomainSource, prepare
from prismoe.data.reader import read_documents
from prismoe.data.shards import Domain
from prismoe.errors import InputError, PrismoeError, ResourceError, UsageError
from prismoe.folder import Manifest
from tests.text import TEXTS, jsonl, one
from tests.tiny import tiny_tokenizer

FEW = settings(max_examples=25, deadline=None, database=None)
DOMAINS = ("arxiv", "books", "c4", "commoncrawl", "github", "stackexchange", "tinystories", "wikipedia")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def reference_ids(tokenizer: Path, texts: list[str]) -> list[int]:
    """What stock transformers gives, told to keep marks of special tokens as text, with `</s>` after each document."""
    from transformers import AutoTokenizer

    stock = AutoTokenizer.from_pretrained(str(tokenizer))
    return [i for text in texts for i in (*stock(text, split_special_tokens=True)["input_ids"], 2)]


@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=0, max_size=40), min_size=1, max_size=8))
@FEW
def test_no_token_is_lost(tmp_path_factory: pytest.TempPathFactory, tokenizer: Path, texts: list[str]) -> None:
    texts = [*texts, "one more"]
    folder = tmp_path_factory.mktemp("p")
    receipt = one(folder, tokenizer, jsonl(folder / "train.jsonl", texts))
    domain, kept = Domain.open(folder / "out" / "d"), [text for text in texts if text]
    assert domain.tokens().tolist() == reference_ids(tokenizer, kept)
    assert domain.num_documents == len(kept)
    assert receipt.domains[0].num_empty == texts.count("")
    assert domain.num_bytes == sum(len(text.encode()) for text in kept)
    ends = domain.ends()
    assert [len(part) for part in np.split(domain.tokens(), ends[:-1, 0])] == [
        len(reference_ids(tokenizer, [text])) for text in kept
    ]
    assert np.diff(ends[:, 1], prepend=0).tolist() == [len(text.encode()) for text in kept]
    assert receipt.domains[0].splits["train"].num_unknown == domain.tokens().tolist().count(0)


def test_heldout_by_hash_puts_copies_on_one_side(tmp_path: Path, tokenizer: Path) -> None:
    texts = ["".join("aeio"[i // 4**digit % 4] for digit in range(5)) for i in range(400)]
    for name, order in (("a", texts + texts[:100]), ("b", texts[::-1])):
        source = {"d": DomainSource((str(jsonl(tmp_path / name / "x.jsonl", order, field="text")),))}
        prepare(source, tokenizer=tokenizer, out=tmp_path / name, heldout_fraction=0.2)
    first, second = (Domain.open(tmp_path / name / "d") for name in "ab")

    def documents(domain: Domain, split: Any) -> list[tuple[int, ...]]:
        return [tuple(part.tolist()) for part in np.split(domain.tokens(split), domain.ends(split)[:-1, 0])]

    assert set(documents(first, "heldout")) == set(documents(second, "heldout"))
    assert not set(documents(first, "heldout")) & set(documents(first, "train"))
    assert 40 < len(set(documents(first, "heldout"))) < 120  # 80 expected; six standard deviations


def test_dtype_follows_the_vocabulary(tmp_path: Path, tokenizer: Path) -> None:
    for vocab_size, dtype in ((128, "uint16"), (65_536, "uint16"), (65_537, "uint32")):
        folder = shutil.copytree(tokenizer, tmp_path / f"t{vocab_size}")
        (folder / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": 2}))
        receipt = one(tmp_path, folder, jsonl(tmp_path / "a.jsonl", TEXTS), force=True)
        assert receipt.dtype == dtype
        tokens = Domain.open(tmp_path / "out" / "d").tokens()
        assert (tokens.dtype, tokens.tolist()) == (np.dtype(dtype), reference_ids(tokenizer, TEXTS))


def test_start_token_follows_the_template(tmp_path: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer, processors

    folder = shutil.copytree(tokenizer, tmp_path / "t")
    changed = Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    changed.save(str(folder / "tokenizer.json"))
    train = jsonl(tmp_path / "a.jsonl", TEXTS)
    assert one(tmp_path, folder, train).start_token == 1
    assert Domain.open(tmp_path / "out" / "d").tokens().tolist() == reference_ids(folder, TEXTS)
    assert one(tmp_path, folder, train, add_special_tokens=False, force=True).start_token is None
    assert Domain.open(tmp_path / "out" / "d").tokens().tolist() == reference_ids(tokenizer, TEXTS)


def test_finished_domains_are_kept_and_others_made(tmp_path: Path, tokenizer: Path) -> None:
    sources = {}
    for name in "ab":
        train = jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
        held = jsonl(tmp_path / f"{name}-held.jsonl", TEXTS)
        sources[name] = DomainSource((str(train),), (str(held),))

    def run(**more: Any) -> list[str]:
        receipt = prepare(sources, tokenizer=tokenizer, out=tmp_path / "out", **more)
        json.dumps(receipt.to_dict(), allow_nan=False)
        return [row.status for row in receipt.domains]

    assert run(dry_run=True) == ["planned", "planned"]
    assert not (tmp_path / "out").exists()
    assert run() == ["made", "made"]
    assert sorted(path.name for path in (tmp_path / "out" / "a").iterdir()) == [
        "heldout-00000-000.ends", "heldout-00000-000.json", "heldout-00000-000.tokens", "heldout.ends",
        "manifest.json", "prismoe.json",
        "train-00000-000.ends", "train-00000-000.json", "train-00000-000.tokens", "train.ends",
    ]  # fmt: skip
    manifest = Manifest.read(tmp_path / "out" / "a")
    assert manifest is not None
    manifest.check(tmp_path / "out" / "a")
    assert str(tmp_path) not in (tmp_path / "out" / "a" / "manifest.json").read_text()  # paths are nobody's business
    assert run() == ["kept", "kept"]
    (tmp_path / "out" / "b" / "manifest.json").unlink()  # what an interruption leaves
    (tmp_path / "out" / "b" / ".train.tokens.7.partial").write_bytes(b"half")
    before = (tmp_path / "out" / "b" / "train-00000-000.tokens").read_bytes()
    assert run() == ["kept", "made"]
    assert (tmp_path / "out" / "b" / "train-00000-000.tokens").read_bytes() == before
    assert not list((tmp_path / "out" / "b").glob(".*"))
    jsonl(tmp_path / "a.jsonl", ["other text"])
    with pytest.raises(ResourceError, match="out/a: output folder holds a different job"):
        run()
    assert run(force=True) == ["made", "made"]
    assert Domain.open(tmp_path / "out" / "a").num_documents == 1


def test_estimate_of_a_dry_run_is_near(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prismoe.data.estimate._COUNTED_BYTES", 1 << 17)
    train = jsonl(tmp_path / "a.jsonl", TEXTS * 4000)  # larger than what is counted and what is tokenised
    planned = one(tmp_path, tokenizer, train, dry_run=True).domains[0].splits["train"]
    made = one(tmp_path, tokenizer, train).domains[0].splits["train"]
    assert planned.num_tokens == pytest.approx(made.num_tokens, rel=0.05)
    assert planned.num_bytes == pytest.approx(made.num_bytes, rel=0.05)
    assert planned.num_documents == pytest.approx(made.num_documents, rel=0.05)


def test_killed_anywhere_the_same_command_gives_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    """SIGKILL at each rename and fsync of the two domains in turn, then the plain command."""
    for name in "ab":
        jsonl(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
        jsonl(tmp_path / f"{name}-held.jsonl", TEXTS)
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import os, pathlib, signal, sys\n"
        "from prismoe.data.prepare import DomainSource, prepare\n"
        "out, left = sys.argv[1], int(sys.argv[2])\n"
        "def counted(call):\n"
        "    def wrapped(*args):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left == 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return call(*args)\n"
        "    return wrapped\n"
        "os.fsync, pathlib.Path.rename = counted(os.fsync), counted(pathlib.Path.rename)\n"
        f"root = {str(tmp_path)!r}\n"
        "sources = {n: DomainSource((f'{root}/{n}.jsonl',), (f'{root}/{n}-held.jsonl',)) for n in 'ab'}\n"
        f"prepare(sources, tokenizer={str(tokenizer)!r}, out=out)\n"
        "print(-left)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}

    def run(out: Path, count: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(driver), str(out), str(count)], env=environment, capture_output=True, text=True
        )

    def content(out: Path) -> dict[str, bytes]:
        return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("[a-z]*") if path.is_file()}

    whole = run(tmp_path / "whole", 0)
    points = int(whole.stdout)
    assert points > 30, whole.stderr
    for count in range(1, points + 1, points // 4):
        out = tmp_path / f"killed{count}"
        assert run(out, count).returncode == -signal.SIGKILL
        finished = run(out, 0)
        assert finished.returncode == 0, finished.stderr
        assert content(out) == content(tmp_path / "whole")


BAD_LINES: list[tuple[bytes, str]] = [
    (
        b'{"content": "a"}\n{"content": "\xff"}\n',
        "a.jsonl:2: not UTF-8 (byte 0xff at offset 13) (hint: convert with iconv)",
    ),
    (b'{"content": "a"\n', "a.jsonl:1: invalid JSON (Expecting ',' delimiter at column 16)"),
    (b'["a"]\n', "a.jsonl:1: a JSON list; needed one JSON object a line"),
    (
        b'{"body": "a", "id": 1}\n',
        "a.jsonl:1: no field content or text (fields: body, id) (hint: name the field that holds the text)",
    ),
    (b'{"content": null}\n', "a.jsonl:1: field content is a NoneType; needed a string"),
    (b'{"content": "\\ud800"}\n', "a.jsonl:1: half of a surrogate pair, which is no character"),
    (b"[" * 100_000, "a.jsonl:1: JSON that cannot be read (RecursionError)"),
    (b"", "a.jsonl: no documents in it"),
    (b"\n\n", "a.jsonl: no documents in it"),
    (
        b'{"content": ""}\n',
        "domain d: no training document with text "
        "(hint: give it more text, held-out files or another heldout_fraction)",
    ),
]


@pytest.mark.parametrize(("data", "message"), BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_text(tmp_path: Path, tokenizer: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(InputError) as caught:
        one(tmp_path, tokenizer, tmp_path / "a.jsonl")
    assert str(caught.value).removeprefix(f"{tmp_path}/") == message
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "out").rglob("manifest.json"))
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_bad_documents_are_left_out_and_counted_up_to_a_limit(tmp_path: Path, tokenizer: Path) -> None:
    texts = [f"some words {number}" for number in range(1999)]
    path = jsonl(tmp_path / "a.jsonl", texts)
    with path.open("ab") as file:
        file.write(b'{]\n{"content": "\xff"}\n')
    with pytest.raises(InputError) as caught:
        one(tmp_path, tokenizer, path, max_bad=0.0009)
    assert str(caught.value) == (
        "2 of 2005 documents cannot be read (1 invalid JSON, 1 not UTF-8), the first: "
        f"{path}:2000: invalid JSON (Expecting property name enclosed in double quotes at column 2); "
        "needed at most 0.09 % (hint: repair them, or raise data.max_bad)"
    )
    with pytest.raises(InputError, match="not a prepared domain"):
        Domain.open(tmp_path / "out" / "d")
    row = one(tmp_path, tokenizer, path).domains[0]  # 2 of 2005 are within 0.1 %
    assert row.bad == {"invalid JSON": 1, "not UTF-8": 1}
    assert row.splits["train"].num_documents == len(texts)
    assert Domain.open(tmp_path / "out" / "d").tokens().tolist() == reference_ids(tokenizer, texts)
    assert one(tmp_path, tokenizer, path).domains[0] == replace(row, status="kept")


def test_tokens_of_an_earlier_version(tmp_path: Path, tokenizer: Path) -> None:
    """Once a split was one file `train.tokens`, and its manifest knew of no shards."""
    one(tmp_path, tokenizer, jsonl(tmp_path / "a.jsonl", TEXTS))
    path = tmp_path / "out" / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["shards"], manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        InputError, match=r"earlier version of prismoe \(hint: make them again with `prismoe prepare --f"
    ):
        Domain.open(path.parent)


def test_bad_sources(tmp_path: Path, tokenizer: Path) -> None:
    good = str(jsonl(tmp_path / "good.jsonl", TEXTS))
    (tmp_path / "x.csv").write_text("a,b")

    def fails(sources: dict[str, DomainSource], kind: type[PrismoeError], message: str, **more: Any) -> None:
        with pytest.raises(kind) as caught:
            prepare(sources, tokenizer=tokenizer, out=tmp_path / "out", **more)
        assert str(caught.value) == message
        assert not (tmp_path / "out").exists()

    fails({}, UsageError, "no domains to prepare")
    fails({"d": DomainSource(())}, UsageError, "domain d: no training text named")
    fails(
        {"../d": DomainSource((good,))},
        UsageError,
        "'../d' as a domain's name; needed letters, digits, _ . - (it names a folder)",
    )
    fails({"d": DomainSource((f"{tmp_path}/no*.jsonl",))}, InputError, f"domain d: no file {tmp_path}/no*.jsonl")
    fails(
        {"d": DomainSource((str(tmp_path),))},
        InputError,
        f"domain d: {tmp_path} is a folder (hint: name its files, for instance {tmp_path}/*.jsonl)",
    )
    fails(
        {"d": DomainSource((f"{tmp_path}/x.csv",))},
        InputError,
        f"{tmp_path}/x.csv: not a kind of file that is read; needed .jsonl .jsonl.zst .jsonl.gz .parquet .txt",
    )
    fails(
        {"d": DomainSource((good,), (good,))},
        UsageError,
        f"domain d: {good} is named twice (hint: held-out text must not be trained on)",
    )
    fails(
        {"d": DomainSource((good,))},
        UsageError,
        "heldout_fraction: 1.5; needed a fraction between 0 and 1",
        heldout_fraction=1.5,
    )


def test_bad_tokenizers(tmp_path: Path, tokenizer: Path) -> None:
    train = jsonl(tmp_path / "a.jsonl", TEXTS)

    def fails(folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            one(tmp_path, folder, train)

    fails(tmp_path / "nowhere", r"nowhere: no tokenizer\.json")
    folder = shutil.copytree(tokenizer, tmp_path / "t")
    (folder / "config.json").write_text('{"vocab_size": 30}')
    fails(folder, r"a\.jsonl:1: token id \d+ for a vocabulary of 30")
    (folder / "tokenizer_config.json").unlink()
    fails(folder, r"tokenizer\.json: no end token that the tokenizer knows; needed eos_token in tokenizer_config")
    (folder / "config.json").write_text('{"eos_token_id": [2, 5]}')
    assert one(tmp_path, folder, train).end_token == 2
    (folder / "tokenizer.json").write_text('{"model": {}}')
    fails(folder, "not a readable fast tokenizer")


def test_disk_too_small(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = jsonl(tmp_path / "a.jsonl", TEXTS * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (1 << 40, 0, 1000))
    with pytest.raises(ResourceError, match=r"out: 1\.0 kB of disk free; needed \d+\.\d kB"):
        one(tmp_path, tokenizer, train)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model", ["stories260K", "babyllama105", "parent-4m"])
def test_real_domains_with_real_tokenizers(shared: Path, tmp_path: Path, model: str) -> None:
    """Some text of all eight domains: ids equal stock transformers', and a mixture of them keeps its weights."""
    folder, counted = shared / "models" / model, 0
    for name in DOMAINS:
        file = shared / "corpora" / name / "heldout.jsonl.zst"
        texts = [document.text for document in islice(read_documents(file), 9)]
        held = jsonl(tmp_path / name / "held.jsonl", texts[:1])
        train = jsonl(tmp_path / name / "train.jsonl", texts[1:])
        source = {name: DomainSource((str(train),), (str(held),))}
        prepare(source, tokenizer=folder, out=tmp_path / "out")
        domain = Domain.open(tmp_path / "out" / name)
        assert domain.tokens().tolist() == reference_ids(folder, texts[1:])
        counted += domain.num_tokens
    assert counted > 100_000
    domains = [Domain.open(tmp_path / "out" / name) for name in DOMAINS]
    mix = Mixture(domains, weights="proportional", seq_len=64, batch_size=50, max_epochs=9)
    batches = [mix.batch(step) for step in range(20)]
    achieved = np.bincount(np.concatenate([batch.domain_ids for batch in batches])) / 1000
    for name, share in zip(mix.names, achieved, strict=True):
        assert share == pytest.approx(mix.weights(0)[name], abs=0.01)
    row, tokens = batches[0].input_ids[7], mix.domains[batches[0].domain_ids[7]].tokens()
    assert row.tolist() in np.lib.stride_tricks.sliding_window_view(tokens, 64)[::64].tolist()


def test_counts_of_a_real_domain_match_its_description(shared: Path, tmp_path: Path) -> None:
    """Documents and bytes of TinyStories as the data's own README gives them."""
    folder = shared / "corpora" / "tinystories"
    source = DomainSource((f"{folder}/train-*.jsonl.zst",), (f"{folder}/heldout.jsonl.zst",))
    receipt = prepare({"tinystories": source}, tokenizer=shared / "models" / "stories260K", out=tmp_path)
    train, heldout = (receipt.domains[0].splits[split] for split in ("train", "heldout"))
    assert (train.num_documents, train.num_bytes) == (2316, 2_070_151)
    assert (heldout.num_documents, heldout.num_bytes) == (960, 790_792)
    assert train.num_unknown == heldout.num_unknown == 0  # this tokenizer falls back to bytes
