"""Shards depend on their own files alone: parts, additions, resumed work and mixed files all give the same bytes."""

from __future__ import annotations

import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.cli import main
from prismoe.data import shard
from prismoe.data.flat import FlatFiles
from prismoe.data.prepare import DomainSource, Prepared, prepare
from prismoe.data.shards import Domain, heldout_windows
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.folder import Manifest
from tests.text import jsonl
from tests.tiny import tiny_tokenizer

NAMES = ("RedPajamaC4", "RedPajamaGithub", "RedPajamaBook")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts(begin: int, count: int) -> list[str]:
    return [f"once upon a time {number} " * (1 + number % 4) for number in range(begin, begin + count)]


def numbered(folder: Path, count: int) -> list[str]:
    return [str(jsonl(folder / f"{number}.jsonl", texts(100 * number, 20))) for number in range(count)]


def content(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("[a-z]*") if path.is_file()}


def states(out: Path) -> dict[str, tuple[int, int]]:
    """Which file it is and when it was written."""
    found = {name: (out / name).stat() for name in content(out)}
    return {name: (state.st_ino, state.st_mtime_ns) for name, state in found.items()}


def make(files: list[str], tokenizer: Path, out: Path, **more: Any) -> Prepared:
    source = {"d": DomainSource(tuple(files))}
    return prepare(source, tokenizer=tokenizer, out=out, heldout_fraction=0.2, **more)


@pytest.mark.parametrize("files_per_shard", [1, 2])
def test_further_files_add_shards(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, files_per_shard: int
) -> None:
    files = numbered(tmp_path, 5)
    make(files, tokenizer, tmp_path / "whole", files_per_shard=files_per_shard)
    make(files[:2], tokenizer, tmp_path / "grown", files_per_shard=files_per_shard)
    before = {name: state for name, state in states(tmp_path / "grown").items() if "-0000" in name}
    for count in (3, 5):
        make(files[:count], tokenizer, tmp_path / "grown", files_per_shard=files_per_shard)
    assert content(tmp_path / "grown") == content(tmp_path / "whole")
    assert before.items() <= states(tmp_path / "grown").items()  # not even written again
    assert len(Domain.open(tmp_path / "grown" / "d").shards["train"]) == -(-5 // files_per_shard)
    for other in (files[1:], files[:1], files[::-1]):
        with pytest.raises(ResourceError, match=r"different job .*has changed"):
            make(other, tokenizer, tmp_path / "grown", files_per_shard=files_per_shard)
    monkeypatch.setattr("prismoe.data.prepare._MAX_SHARDS", 2)
    with pytest.raises(UsageError, match=r"domain d: 5 train files \(hint: raise data\.files_per_shard\)"):
        make(files, tokenizer, tmp_path / "many")


def test_parts_in_any_order_and_number(tmp_path: Path, tokenizer: Path) -> None:
    files = numbered(tmp_path, 5)
    make(files, tokenizer, tmp_path / "whole")
    for parts in (2, 7):
        out = tmp_path / f"parts{parts}"
        for part in reversed(range(1, parts + 1)):
            receipt = make(files, tokenizer, out, part=(part, parts))
            assert [row.status for row in receipt.domains] == ["part"]
            assert not (out / "d" / "manifest.json").exists()
        (out / "d" / ".train-00000-000.tokens.7.partial").write_bytes(b"of a part that was killed")
        receipt = make(files, tokenizer, out)
        assert receipt.encoder == ""  # nothing was left to tokenise
        assert content(out) == content(tmp_path / "whole")
        make(files, tokenizer, out, part=(1, parts))  # a part that comes too late changes nothing
        assert content(out) == content(tmp_path / "whole")
    with pytest.raises(UsageError, match="part 3/2; needed 1/N to N/N"):
        make(files, tokenizer, tmp_path / "x", part=(3, 2))
    with pytest.raises(UsageError, match="force with a part"):
        make(files, tokenizer, tmp_path / "x", part=(1, 2), force=True)
    with pytest.raises(ResourceError, match="output folder holds a different job"):
        make(files, tokenizer, tmp_path / "whole", part=(1, 2), add_special_tokens=True, files_per_shard=2)


def test_part_on_the_command_line(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = numbered(tmp_path, 3)
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps({"data": {"tokenizer": str(tokenizer), "domains": {"d": {"train": files}}}}))
    command = ["prepare", str(config), "--out", str(tmp_path / "run"), "source=" + str(tokenizer), "--json"]
    (tokenizer / "config.json").write_text('{"model_type": "llama"}')
    for part in ("1/2", "2/2"):
        assert main([*command, "data.heldout_fraction=0.2", "--part", part]) == 0
        assert json.loads(capsys.readouterr().out)["domains"][0]["status"] == "part"
    command[-1:] = ["data.heldout_fraction=0.2", "--json"]
    assert main(command) == 0
    shard_file = tmp_path / "run" / "data" / "d" / "train-00001-000.tokens"
    shard_file.write_bytes(shard_file.read_bytes()[:-2])  # a finished run, asked by name, looks at what it has
    capsys.readouterr()
    assert main(command) == 3
    assert "train-00001-000.tokens: " in capsys.readouterr().err
    assert main([*command, "--force"]) == 0
    (tmp_path / "file").touch()
    assert main(["prepare", str(config), "--out", str(tmp_path / "file"), "source=" + str(tokenizer)]) == 4
    assert "file: cannot make the output folder: File exists" in capsys.readouterr().err
    assert main([*command, "--part", "x"]) == 2
    assert "--part x; needed I/N, for instance 3/64" in capsys.readouterr().err
    assert main(["plan", "--part", "1/2"]) == 2


def test_a_large_file_gives_several_shards_and_stopping_costs_one(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path / "a.jsonl", texts(0, 200))
    with path.open("ab") as file:
        file.write(b"\n{bad\n")
    monkeypatch.setattr(shard, "_SEGMENT_BYTES", 2000)
    make([str(path)], tokenizer, tmp_path / "whole", max_bad=0.1)
    domain = Domain.open(tmp_path / "whole" / "d")
    assert len(domain.shards["train"]) > 3
    calls = 0
    finish = shard._Segment._finish

    def stop(self: Any, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        finish(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shard._Segment, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            make([str(path)], tokenizer, tmp_path / "stopped", max_bad=0.1)
    kept = {name: state for name, state in states(tmp_path / "stopped").items() if ".tokens" in name}
    assert sum("train" in name for name in kept) == 2
    make([str(path)], tokenizer, tmp_path / "stopped", max_bad=0.1)
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")
    assert kept.items() <= states(tmp_path / "stopped").items()
    assert json.loads((tmp_path / "whole/d/manifest.json").read_text())["config"]["bad"] == {"invalid JSON": 1}


def test_several_shards_read_as_one_array(tmp_path: Path, tokenizer: Path) -> None:
    files = numbered(tmp_path, 4)
    make(files, tokenizer, tmp_path / "several")
    make(files, tokenizer, tmp_path / "one", files_per_shard=4)
    several, one = (Domain.open(tmp_path / name / "d") for name in ("several", "one"))
    flat, plain = several.tokens(), np.asarray(one.tokens())
    assert isinstance(flat, FlatFiles)
    assert not isinstance(one.tokens(), FlatFiles)
    assert (len(flat), flat.dtype, flat.tolist()) == (len(plain), plain.dtype, plain.tolist())
    assert several.ends().tolist() == one.ends().tolist()
    generator = np.random.default_rng(0)
    for _ in range(200):
        begin, end = sorted(generator.integers(0, len(plain) + 1, 2).tolist())
        assert flat[begin:end].tolist() == plain[begin:end].tolist()
        where = generator.integers(-len(plain), len(plain), 5)
        assert flat[where].tolist() == plain[where].tolist()
    assert (flat[-1], flat[:0].tolist(), flat[::-7].tolist()) == (plain[-1], [], plain[::-7].tolist())
    with pytest.raises(IndexError):
        flat[len(plain)]
    for one_of, other in zip(heldout_windows(several, seq_len=7), heldout_windows(one, seq_len=7), strict=True):
        assert one_of[0].tolist() == other[0].tolist()


def mixed(folder: Path, count: int) -> list[str]:
    """Files of documents of three sets, and each set alone as a file of its own beside every one."""
    files = []
    for number in range(count):
        rows = [(NAMES[i * i % 3], text) for i, text in enumerate(texts(100 * number, 30))]
        path = folder / f"mixed{number}.jsonl.gz"
        lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) for name, text in rows]
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
        for name in NAMES:
            jsonl(folder / f"{name}{number}.jsonl", [text for other, text in rows if other == name])
        files.append(str(path))
    return files


def test_mixed_files_are_read_once_and_split(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = mixed(tmp_path, 3)
    opened: list[Path] = []
    read = shard.read_documents
    monkeypatch.setattr(shard, "read_documents", lambda path, **more: opened.append(path) or read(path, **more))
    kinds = {name: DomainSource(tuple(files), select={"meta.redpajama_set_name": (name,)}) for name in NAMES[:2]}
    prepare(kinds, tokenizer=tokenizer, out=tmp_path / "out", heldout_fraction=0.2)
    assert list(map(str, opened)) == files
    for name in NAMES[:2]:
        alone = tuple(str(tmp_path / f"{name}{number}.jsonl") for number in range(3))
        prepare({name: DomainSource(alone)}, tokenizer=tokenizer, out=tmp_path / "alone", heldout_fraction=0.2)
        for split in ("train", "heldout"):
            found, expected = (Domain.open(tmp_path / out / name) for out in ("out", "alone"))
            assert found.tokens(split).tolist() == expected.tokens(split).tolist()
            assert found.ends(split).tolist() == expected.ends(split).tolist()
    wrong = DomainSource(tuple(files), select={"meta.set_name": ("RedPajamaC4",)})
    with pytest.raises(
        InputError, match=r"90 of 90 documents cannot be read \(90 missing field\).*no field meta\.set_name"
    ):
        prepare({"x": wrong}, tokenizer=tokenizer, out=tmp_path / "wrong")
    nothing = DomainSource(tuple(files), select={"meta.redpajama_set_name": ("redpajamac4",)})
    with pytest.raises(InputError, match="domain y: no training document with text"):
        prepare({"y": nothing}, tokenizer=tokenizer, out=tmp_path / "wrong")


def test_only_kept_documents(tmp_path: Path, tokenizer: Path) -> None:
    files, sift = numbered(tmp_path, 2), tmp_path / "sift"
    (sift / "d").mkdir(parents=True)
    with pytest.raises(InputError, match="sift: not a finished sift"):
        make(files, tokenizer, tmp_path / "out", keep=sift)
    Manifest(kind="sift", parents={}, config={}, files={}).write(sift)
    kept = [np.arange(20) % 3 == 0, np.arange(20) > 4]
    for number, keep in enumerate(kept):
        (sift / "d" / f"train-{number:05d}.keep").write_bytes(keep.astype(np.uint8).tobytes())
    receipt = make(files, tokenizer, tmp_path / "out", keep=sift)
    assert receipt.domains[0].num_filtered == 40 - sum(int(keep.sum()) for keep in kept)
    chosen = [
        str(jsonl(tmp_path / f"chosen{n}.jsonl", [text for text, k in zip(texts(100 * n, 20), keep, strict=True) if k]))
        for n, keep in enumerate(kept)
    ]
    make(chosen, tokenizer, tmp_path / "chosen")
    for split in ("train", "heldout"):
        found, expected = (Domain.open(tmp_path / out / "d").tokens(split).tolist() for out in ("out", "chosen"))
        assert found == expected
    (sift / "d" / "train-00000.keep").write_bytes(bytes(20))  # what was kept has changed
    with pytest.raises(ResourceError, match="different job"):
        make(files, tokenizer, tmp_path / "out", keep=sift)
    (sift / "d" / "train-00001.keep").unlink()
    with pytest.raises(InputError, match=r"train-00001\.keep: cannot be read: No such file"):
        make(files, tokenizer, tmp_path / "out", keep=sift)


def test_a_changed_shard_is_found(tmp_path: Path, tokenizer: Path) -> None:
    files = numbered(tmp_path, 3)
    make(files, tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "d" / "train-00001-000.tokens"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(InputError, match=r"train-00001-000\.tokens: sha256 .* differs from the manifest's"):
        make(files, tokenizer, tmp_path / "out")
    (tmp_path / "out" / "d" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"train-00001-000\.tokens: changed after it was written"):
        make(files, tokenizer, tmp_path / "out")
    make(files, tokenizer, tmp_path / "out", force=True)
    make(files, tokenizer, tmp_path / "again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


def test_a_full_disk(tmp_path: Path, tokenizer: Path) -> None:
    """Every file size at which the writing can stop: one line, nothing half-written, and the same bytes afterwards."""
    files = numbered(tmp_path, 2)
    make(files, tokenizer, tmp_path / "whole")
    driver = tmp_path / "driver.py"
    driver.write_text(
        "import resource, sys\n"
        "from prismoe.data.prepare import DomainSource, prepare\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))\n"
        "try:\n"
        f"    prepare({{'d': DomainSource({tuple(files)!r})}}, tokenizer={str(tokenizer)!r}, out=sys.argv[1],\n"
        "            heldout_fraction=0.2)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    for limit in (0, 150, 800, 2000):
        out = tmp_path / f"out{limit}"
        found = subprocess.run(
            [sys.executable, str(driver), str(out), str(limit)], env=environment, capture_output=True, text=True
        )
        assert found.stdout.startswith("ResourceError"), found.stderr
        assert "cannot " in found.stdout
        whole = content(tmp_path / "whole")
        assert all(whole[name] == data for name, data in content(out).items()) if out.exists() else True
        assert "d/manifest.json" not in content(out)
        make(files, tokenizer, out)
        assert content(out) == whole
