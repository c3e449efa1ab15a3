"""The attacks with a name: each is refused by the command that meets it, in one line that names the file."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.processes import command

Attack = Callable[[Path], tuple[str, ...]]
"""Spoils the folder (a dense model `dense`, a config `run.yaml`, text) and gives the command that meets it."""

MEMORY = 6 << 30  # of address space, of which torch maps most


def run(place: Place) -> Iterator[Outcome]:
    place.command("plan", str(place.config), "--out", str(place.folder / "plan"))
    canary = place.folder / "canary"
    cases: dict[str, str | None] = {}
    for name, attack in _attacks(place.folder / "plan" / "plan.safetensors", canary).items():
        folder = place.fresh("attack", like=place.config.parent)
        config = folder / "run.yaml"
        config.write_text((folder / "config.yaml").read_text().replace(str(place.config.parent), str(folder)))
        words = attack(folder)
        done = command((*words, "--out", str(folder / "out")), log=place.folder / "log", memory=MEMORY, timeout=60)
        lines = [line for line in done.error.splitlines() if line.startswith("prismoe: ")]
        problem = None
        if canary.exists():
            problem = "THE CANARY RAN"
        elif done.code not in (2, 3, 4) or "Traceback" in done.error:
            problem = f"exit {done.code}: {done.last_line[:200]}"
        elif not lines or str(folder) not in lines[-1]:
            problem = f"names no file: {done.last_line[:200]}"
        cases[name] = problem
    yield Outcome.of("named attacks: refused in one line that names the file; no canary runs", cases, goal=len(cases))


def _json(path: Path, **change: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


def _attacks(plan: Path, canary: Path) -> dict[str, Attack]:
    # `os.system` by name, as a pickle says it: written by hand, because nothing here makes pickles.
    pickled = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."

    def planned(spoil: Callable[[Path], object]) -> Attack:
        def attack(folder: Path) -> tuple[str, ...]:
            spoil(folder / "dense")
            return ("plan", str(folder / "run.yaml"))

        return attack

    def prepared(spoil: Callable[[Path], object]) -> Attack:
        def attack(folder: Path) -> tuple[str, ...]:
            spoil(folder)
            return ("prepare", str(folder / "run.yaml"))

        return attack

    def index(name: object) -> Callable[[Path], object]:
        def spoil(dense: Path) -> None:
            weights = {"model.norm.weight": name}
            (dense / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))

        return spoil

    def header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
        def spoil(dense: Path) -> None:
            data = (dense / "model.safetensors").read_bytes()
            length = struct.unpack("<Q", data[:8])[0]
            tensors = json.loads(data[8 : 8 + length])
            text = change(tensors) or tensors
            text = text if isinstance(text, bytes) else json.dumps(text).encode()
            (dense / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

        return spoil

    def link(dense: Path) -> None:
        target = dense.parent / "elsewhere.safetensors"
        shutil.move(dense / "model.safetensors", target)
        (dense / "model.safetensors").symlink_to(target)

    def bin_only(dense: Path) -> None:
        (dense / "model.safetensors").unlink()
        (dense / "pytorch_model.bin").write_bytes(pickled)

    def shown(folder: Path) -> tuple[str, ...]:
        shutil.copy(plan, folder / "a.safetensors")
        (folder / "a.safetensors").write_bytes(pickled)
        return ("plan", "--compare", str(folder / "a.safetensors"), str(plan))

    def yaml(text: str) -> Attack:
        def attack(folder: Path) -> tuple[str, ...]:
            (folder / "run.yaml").write_text(text)
            return ("plan", str(folder / "run.yaml"))

        return attack

    norm = "model.norm.weight"
    bomb = "a: &a [x, x]\n" + "\n".join(f"b{n}: &b{n} [*a, *a]" for n in range(9))
    config = "config.json"
    deep = "[" * 100_000 + "]" * 100_000
    return {
        "an absolute path in a weight map": planned(index("/etc/passwd")),
        "a parent path in a weight map": planned(index("../../x.safetensors")),
        "a number for a file in a weight map": planned(index(7)),
        "a link out of the folder": planned(link),
        "a key twice in a header": planned(header(lambda t: json.dumps(t).encode()[:-1] + b', "a": {}, "a": {}}')),
        "overlapping offsets": planned(header(lambda t: t[norm].update(data_offsets=[0, 256]))),
        "offsets out of range": planned(header(lambda t: t[norm].update(data_offsets=[2**40, 2**40 + 256]))),
        "a huge dimension in a header": planned(header(lambda t: t[norm].update(shape=[2**62]))),
        "a negative dimension in a header": planned(header(lambda t: t[norm].update(shape=[-64]))),
        "a huge dimension in config.json": planned(lambda d: _json(d / config, hidden_size=2**40)),
        "a negative dimension in config.json": planned(lambda d: _json(d / config, hidden_size=-64)),
        "auto_map": planned(lambda d: _json(d / config, auto_map={"AutoConfig": "x.Y"})),
        "attention from the hub": planned(lambda d: _json(d / config, _attn_implementation="owner/kernel")),
        "experts from the hub": planned(lambda d: _json(d / config, experts_implementation="owner/kernel")),
        "a JSON depth bomb": planned(lambda d: (d / config).write_text('{"a":' + deep + "}")),
        "a YAML alias bomb": yaml(bomb),
        "a key twice in YAML": yaml("source: a\nsource: b"),
        "a YAML tag that calls": yaml(f"source: !!python/object/apply:os.system ['touch {canary}']"),
        "a zstd bomb": prepared(
            lambda f: (
                (f / "stories0.jsonl").rename(f / "x")
                and (f / "run.yaml").write_text((f / "run.yaml").read_text().replace("stories*.jsonl", "b.jsonl.zst"))
                and (f / "b.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b" " * (1 << 29)))
            )
        ),
        "a gzip bomb": prepared(
            lambda f: (
                (f / "run.yaml").write_text((f / "run.yaml").read_text().replace("stories*.jsonl", "b.jsonl.gz"))
                and (f / "b.jsonl.gz").write_bytes(gzip.compress(b" " * (1 << 28)))
            )
        ),
        "a pickle beside nothing": planned(bin_only),
        "a pickle as weights": planned(lambda d: (d / "model.safetensors").write_bytes(pickled)),
        "a pickle as config.json": planned(lambda d: (d / config).write_bytes(pickled)),
        "a pickle as an index": planned(lambda d: (d / "model.safetensors.index.json").write_bytes(pickled)),
        "a pickle as a tokenizer": prepared(lambda f: (f / "dense" / "tokenizer.json").write_bytes(pickled)),
        "a pickle as tokenizer settings": prepared(
            lambda f: (f / "dense" / "tokenizer_config.json").write_bytes(pickled)
        ),
        "a pickle as a plan": shown,
        "a pickle as a config": lambda f: ((f / "run.yaml").write_bytes(pickled), ("plan", str(f / "run.yaml")))[1],
        "a pickle as a manifest": planned(
            lambda d: (d / "manifest.json").write_bytes(b'{"kind":"x","files":{},"parents":{},"key":""}' + pickled)
        ),
        "a tokenizer that panics": prepared(
            lambda f: (f / "dense" / "tokenizer.json").write_text(
                '{"model": {"type": "Unigram", "vocab": [], "unk_id": 9}}'
            )
        ),
    }
