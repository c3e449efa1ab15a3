"""The attacks with a name: what a stranger puts into a folder, and the command that meets it."""

from __future__ import annotations

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard

from tests.bombs import BOMBS

__all__ = ["Attack", "named", "pickles", "templates"]

Attack = Callable[[Path], tuple[str, ...]]
"""Spoils the folder (a dense model `dense`, a config `run.yaml`, text) and gives the command that meets it."""

Spoil = Callable[[Path], object]
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD = "model-00001-of-00001.safetensors"
NORM = "model.norm.weight"


def _model(spoil: Spoil) -> Attack:
    """`spoil` changes the dense model, which `plan` reads."""
    return lambda folder: (spoil(folder / "dense"), ("plan", str(folder / "run.yaml")))[1]


def _text(spoil: Spoil) -> Attack:
    """`spoil` changes text or tokenizer, which `prepare` reads."""
    return lambda folder: (spoil(folder), ("prepare", str(folder / "run.yaml")))[1]


def _said(spoil: Spoil, *more: str) -> Attack:
    """`spoil` changes tokenizer or template, which `generate` reads."""
    words = ("generate", "{dense}", "prompt=Once upon a time", "max_new_tokens=2", *more)
    return lambda folder: (spoil(folder / "dense"), tuple(w.format(dense=folder / "dense") for w in words))[1]


def _yaml(text: str | bytes) -> Attack:
    data = text.encode() if isinstance(text, str) else text
    return lambda folder: ((folder / "run.yaml").write_bytes(data), ("plan", str(folder / "run.yaml")))[1]


def _put(name: str, data: str | bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def _change(name: str, **change: Any) -> Spoil:
    return lambda folder: (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **change}))


def _index(name: object) -> Spoil:
    return _put(INDEX, json.dumps({"weight_map": {NORM: name}}))


def _header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """`change` changes the header of the weights, or gives another."""

    def spoil(dense: Path) -> None:
        data = (dense / SINGLE).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        tensors = json.loads(data[8 : 8 + length])
        text = change(tensors) or tensors
        text = text if isinstance(text, bytes) else json.dumps(text).encode()
        (dense / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return spoil


def _linked(name: str, *, chain: bool = False) -> Spoil:
    """A file is a link out of the folder."""

    def spoil(dense: Path) -> None:
        target = dense.parent / f"elsewhere-{name}"
        (dense / name).rename(target)
        if chain:
            (dense / "inside").symlink_to(target)
        (dense / name).symlink_to("inside" if chain else target)

    return spoil


def _sharded(spoil: Spoil) -> Spoil:
    """The weights are one shard that an index names."""

    def both(dense: Path) -> None:
        data = (dense / SINGLE).read_bytes()
        names = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]]).keys() - {"__metadata__"}
        (dense / SINGLE).rename(dense / SHARD)
        (dense / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, SHARD)}))
        spoil(dense)

    return both


def _packed(suffix: str, data: bytes) -> Attack:
    """The stories are one packed file."""

    def spoil(folder: Path) -> None:
        config = folder / "run.yaml"
        config.write_text(config.read_text().replace("stories*.jsonl", f"b.jsonl.{suffix}"))
        (folder / f"b.jsonl.{suffix}").write_bytes(data)

    return _text(spoil)


def _fields() -> dict[str, Attack]:
    """What a config.json may not ask of the stock library."""
    hub = "owner/kernel"
    fields: dict[str, Any] = {
        "auto_map": {"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Z"},
        "_attn_implementation": hub,
        "attn_implementation": hub,
        "_attn_implementation_internal": f"paged|{hub}:function",
        "experts_implementation": hub,
        "_experts_implementation_internal": hub,
        "kernel_config": {"kernel_mapping": {"RMSNorm": f"{hub}:RMSNorm"}},
        "text_config": {"auto_map": {"AutoConfig": "x.Y"}},
        "sub": {"deep": {"_attn_implementation": {"": hub}}},
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    return {f"{name} in config.json": _model(_change(CONFIG, **{name: value})) for name, value in fields.items()}


def named(canary: Path) -> dict[str, Attack]:
    """All but pickles and templates, by name. `canary` is what an attack that runs would touch."""
    deep = "[" * 100_000 + "]" * 100_000
    layered = "a: &a [x, x]\n" + "\n".join(f"b{n}: &b{n} [*a, *a]" for n in range(9))
    laughs = "a: &a [x, x]\n" + "\n".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]" for n in range(24)
    )
    window = bytes.fromhex("28b52ffd00a8") + (1 | 1 << 3).to_bytes(3, "little") + b"{"  # a frame that asks for 2 GiB
    unread = json.dumps({"model": {"type": "Unigram", "vocab": [], "unk_id": 9}})
    stride = {"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    return {
        "an absolute path in a weight map": _model(_index("/etc/passwd")),
        "a parent path in a weight map": _model(_index("../../x.safetensors")),
        "a backslash in a weight map": _model(_index("..\\x.safetensors")),
        "a zero byte in a weight map": _model(_index("x\0.safetensors")),
        "a number for a file in a weight map": _model(_index(7)),
        "a link out of the folder": _model(_linked(SINGLE)),
        "a link out of the folder in a weight map": _model(_sharded(_linked(SHARD))),
        "a chain of links out of the folder": _model(_linked(SINGLE, chain=True)),
        "a config.json that is a link": _model(_linked(CONFIG)),
        "an index that is a link": _model(_sharded(_linked(INDEX))),
        "a config.json that is a pipe": _model(lambda d: ((d / CONFIG).unlink(), os.mkfifo(d / CONFIG))),
        "a key twice in a header": _model(_header(lambda t: json.dumps(t).encode()[:-1] + b', "a": {}, "a": {}}')),
        "a key twice in config.json": _model(_put(CONFIG, '{"model_type": "llama", "model_type": "llama"}')),
        "a key twice in a weight map": _model(_put(INDEX, f'{{"weight_map": {{"a": "{SHARD}", "a": "{SHARD}"}}}}')),
        "overlapping offsets": _model(_header(lambda t: t[NORM].update(data_offsets=[0, 256]))),
        "offsets out of range": _model(_header(lambda t: t[NORM].update(data_offsets=[2**40, 2**40 + 256]))),
        "negative offsets": _model(_header(lambda t: t[NORM].update(data_offsets=[-256, 0]))),
        "a huge dimension in a header": _model(_header(lambda t: t[NORM].update(shape=[2**62]))),
        "dimensions that overflow in a header": _model(_header(lambda t: t[NORM].update(shape=[2**33, 2**33, 0]))),
        "a negative dimension in a header": _model(_header(lambda t: t[NORM].update(shape=[-64]))),
        "a header longer than the file": _model(_put(SINGLE, struct.pack("<Q", 2**63) + b"{}")),
        "a huge dimension in config.json": _model(_change(CONFIG, hidden_size=2**40)),
        "huge layers in config.json": _model(_change(CONFIG, num_hidden_layers=2**31 - 1)),
        "a huge vocabulary in config.json": _model(_change(CONFIG, vocab_size=2**31 - 1)),
        "a negative dimension in config.json": _model(_change(CONFIG, hidden_size=-64)),
        **_fields(),
        "a JSON depth bomb as config.json": _model(_put(CONFIG, f'{{"a":{deep}}}')),
        "a JSON depth bomb as an index": _model(_put(INDEX, f'{{"weight_map":{deep}}}')),
        "a JSON depth bomb as a header": _model(_header(lambda _: f'{{"a":{deep}}}'.encode())),
        "JSON of 33 MB": _model(lambda d: os.truncate(d / CONFIG, 33_000_000)),
        "a YAML alias bomb": _yaml(layered),
        "a billion laughs in YAML": _yaml(laughs),
        "a YAML depth bomb": _yaml("source: " + "[" * 20_000),
        "a key twice in YAML": _yaml("source: a\nsource: b"),
        "a YAML tag that calls": _yaml(f"source: !!python/object/apply:os.system ['touch {canary}']"),
        "a zstd bomb": _packed("zst", zstandard.ZstdCompressor().compress(b" " * (1 << 29))),
        "a zstd window of 2 GiB": _packed("zst", window),
        "a gzip bomb": _packed("gz", gzip.compress(b" " * (1 << 28))),
        "a JSON depth bomb as text": _text(_put("stories0.jsonl", f'{{"content": {deep}}}\n' * 40)),
        "a tokenizer without a vocabulary": _text(_put("dense/tokenizer.json", unread)),
        "a tokenizer that panics": _said(_change("tokenizer.json", truncation=stride)),
        "a tokenizer of 200 MB": _said(lambda d: os.truncate(d / "tokenizer.json", 200_000_000)),
        "a JSON depth bomb as a tokenizer": _text(_put("dense/tokenizer.json", f'{{"model":{deep}}}')),
        "auto_map in tokenizer_config.json": _said(
            _change("tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, chat_template=7),
            "template=model",
        ),
    }


def templates() -> dict[str, Attack]:
    """Chat templates of a model folder: programs that would take time, memory or a look around."""
    return {name: _said(_put("chat_template.jinja", source), "template=model") for name, (source, _) in BOMBS.items()}


def pickles(plan: Path, canary: Path) -> dict[str, Attack]:
    """A pickle that touches `canary`, in the place of each file. It is written by hand, because nothing here makes any:
    `os.system` by name, as a pickle says it.
    """
    data = b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."

    def alone(dense: Path) -> None:
        (dense / SINGLE).unlink()
        (dense / "pytorch_model.bin").write_bytes(data)

    def marked(folder: Path) -> tuple[str, ...]:
        (folder / "out").mkdir()
        (folder / "out" / "prismoe.json").write_bytes(data)
        return ("plan", str(folder / "run.yaml"))

    def shown(folder: Path) -> tuple[str, ...]:
        (folder / "a.safetensors").write_bytes(data)
        return ("plan", "--compare", str(folder / "a.safetensors"), str(plan))

    def asked(folder: Path) -> tuple[str, ...]:
        (folder / "prompts.jsonl").write_bytes(data)
        return ("generate", str(folder / "dense"), str(folder / "prompts.jsonl"))

    return {
        "pytorch_model.bin alone": _model(alone),
        "model.safetensors": _model(_put(SINGLE, data)),
        "a shard of a weight map": _model(_sharded(_put(SHARD, data))),
        "config.json": _model(_put(CONFIG, data)),
        "an index": _model(_put(INDEX, data)),
        "manifest.json": _model(_put("manifest.json", b'{"kind":"x","files":{},"parents":{},"key":""}' + data)),
        "prismoe.json of a run": marked,
        "tokenizer.json": _text(_put("dense/tokenizer.json", data)),
        "tokenizer_config.json": _text(_put("dense/tokenizer_config.json", data)),
        "chat_template.jinja": _said(_put("chat_template.jinja", data), "template=model"),
        "a plan": shown,
        "a config": _yaml(data),
        "text": _text(_put("stories0.jsonl", data * 40)),
        "prompts": asked,
    }
