"""Files from strangers, broken in 20,000 ways: each is refused in one line that names it, or read."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.report import random_trace
from tests.torture.guarded import Case, attempt, read
from tests.torture.mutate import broken_bytes, broken_json, broken_sealed
from tests.torture.outcome import Outcome
from tests.torture.place import Place

SECONDS = 80
SHORT, FULL = 20_000, 200_000
TURN = 100  # mutations of one kind that a process does
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q:' + m['content'] }}{% else %}{{ 'A:' }}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
Breaks = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A kind of file: `breaks` gives other bytes for `file` of a folder, `opens` reads the folder."""

    file: str
    breaks: Breaks
    opens: Callable[[Path], Any]
    share: int = 4  # of the mutations


def run(place: Place) -> Iterator[Outcome]:
    count = FULL if place.full else SHORT
    made = prepare(place)
    whole = attempt([partial(_whole, place.folder / "made" / kind, target) for kind, target in made.items()])
    assert not any(whole), dict(zip(made, whole, strict=True))
    shares = sum(target.share for target in made.values())
    numbers = {kind: range(-(-count * target.share // shares)) for kind, target in made.items()}
    # In turns, so that every kind has its part where the time is too short for all.
    rounds = range(-(-max(map(len, numbers.values())) // TURN))
    turns = [(kind, part) for turn in rounds for kind in made if (part := numbers[kind][turn * TURN :][:TURN])]

    def check(turn: tuple[str, range]) -> str | None:
        kind, part = turn
        folder = Path("made").resolve()  # the worker's own
        if not folder.exists():
            shutil.copytree(place.folder / "made", folder)
        data = (place.folder / "made" / kind / made[kind].file).read_bytes()
        cases = [_case(folder / kind, made[kind], data, f"{place.seed} {kind} {number}") for number in part]
        faults = {number: found for number, found in zip(part, attempt(cases), strict=True) if found is not None}
        return json.dumps(faults) if faults else None

    found = place.spread(turns, check)
    cases: dict[str, str | None] = {}
    for kind, part in turns:
        if str((kind, part)) not in found:
            continue  # no time was left
        faults = found[str((kind, part))] or "{}"
        known = json.loads(faults) if faults.startswith("{") else dict.fromkeys(map(str, part), faults)
        cases |= {f"{kind} {number}": known.get(str(number)) for number in part}
    for kind in made:
        tried = [name for name in cases if name.rpartition(" ")[0] == kind]
        print(f"         {kind}: {sum(cases[name] is None for name in tried)} of {len(tried)}", file=sys.stderr)
    what = f"hostile files of {len(made)} kinds: read, or refused in a line that names the file, in 2 s and 1 GiB"
    yield Outcome.of(what, cases, goal=count)


def _whole(folder: Path, target: Target) -> str | None:
    target.opens(folder)
    return None


def _case(folder: Path, target: Target, whole: bytes, seed: str) -> Case:
    def case() -> str | None:
        path = folder / target.file
        path.write_bytes(target.breaks(whole, random.Random(seed)))
        return read(lambda: target.opens(folder), (path.name, str(folder)))

    return case


def prepare(place: Place) -> dict[str, Target]:
    """A folder `made/KIND` with whole files for each kind, and how they are broken and read."""
    from tests.handmade import handmade
    from tests.tiny import tiny_dense

    made = place.fresh("made")
    run = place.folder / "whole"
    place.command("plan", str(place.config), "--out", str(run))
    place.command("prepare", str(place.config), "--out", str(run))
    sizes = ["calibrate.seq_len=16", "calibrate.max_tokens=512", "calibrate.quantities=[activation, marks]"]
    place.command("calibrate", str(place.config), *sizes, "calibrate.sample_tokens=64", "--out", str(run))
    handmade(made / "config.json")
    handmade(made / "safetensors header")
    handmade(made / "index", shards=3)
    tiny_dense(made / "stock config.json")
    for kind in ("tokenizer.json", "tokenizer_config.json", *CHATS):
        tiny_dense(made / kind)
        (made / kind / "chat_template.jinja").write_text(TEMPLATE)
        (made / kind / "special_tokens_map.json").write_text('{"eos_token": "</s>", "unk_token": {"content": "<unk>"}}')
    for kind in ("run state", "plan", "routing trace", "statistics", "config YAML", "conversations", "text"):
        (made / kind).mkdir()
    shutil.copy(run / "plan.safetensors", made / "plan")
    shutil.copytree(run / "data" / "stories", made / "domain manifest")
    shutil.copytree(made / "domain manifest", made / "ends of documents")
    shutil.copytree(made / "domain manifest", made / "mark")
    shutil.copy(run / "run.json", made / "run state")
    random_trace().save(made / "routing trace" / "trace.safetensors")
    (made / "config YAML" / "run.yaml").write_text(place.config.read_text())
    rows = (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": f"Ho {n}"}]} for n in range(4)
    )
    (made / "conversations" / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "text" / "text.jsonl").write_text('{"content": "a b c"}\n{"content": "d", "more": [1, {"x": null}]}\n')
    shutil.copytree(run / "calibration", made / "calibration manifest")
    shutil.copytree(run / "calibration", made / "calibrated sequences")
    statistics = next((made / "calibration manifest").glob("*0.safetensors"))
    shutil.copy(statistics, made / "statistics" / "layer.safetensors")
    return _targets()


def _targets() -> dict[str, Target]:
    from prismoe.checkpoint import Checkpoint
    from prismoe.checkpoint.family import check_tensors
    from prismoe.config import load_config
    from prismoe.data.reader import read_documents
    from prismoe.data.shards import Domain, heldout_windows
    from prismoe.data.tokenizer import DocumentTokenizer
    from prismoe.folder import read_mark, unchecked
    from prismoe.plan import Plan
    from prismoe.routing.record import RoutingTrace
    from prismoe.state import read_state
    from prismoe.stats import NeuronStats
    from prismoe.stats.calibration import SEQUENCES, Calibration
    from prismoe.train.model import load_model
    from prismoe.tune.conversations import read_conversations
    from prismoe.tune.render import open_template
    from prismoe.tune.rows import open_tokenizer

    def checkpoint(folder: Path) -> None:
        found = Checkpoint.open(folder)
        shapes = {name: info.shape for name, info in found.tensors.items()}
        check_tensors(found.family, shapes, where=str(folder))
        found.fingerprint  # noqa: B018  reads a page of each tensor
        found.ffn(0)

    def domain(folder: Path) -> None:
        found = Domain.open(folder)
        found.tokens()[:10]
        list(heldout_windows(found, seq_len=16))

    def tokenizer(folder: Path) -> None:
        found = DocumentTokenizer.open(folder)
        found.encode(["Once upon a time", "", "\0 x </s>"])
        found.quicker(["Once upon a time"]).encode(["The king said"])

    def calibration(folder: Path) -> None:
        Calibration.open(folder).layer(0)

    def sequences(folder: Path) -> None:
        with unchecked():  # a stranger's manifest would fit
            Calibration.open(folder).layer(0)

    def chat(folder: Path) -> None:
        found = open_tokenizer(Checkpoint.open(folder))
        open_template("model", tokenizer=found).close()

    return {
        "safetensors header": Target("model.safetensors", broken_sealed, checkpoint, 12),
        "index": Target("model.safetensors.index.json", _json, checkpoint, 8),
        "config.json": Target("config.json", _json, checkpoint, 12),
        "stock config.json": Target("config.json", _json, load_model),
        "plan": Target("plan.safetensors", _inside("plan"), lambda f: Plan.load(f / "plan.safetensors"), 12),
        "config YAML": Target("run.yaml", _yaml, lambda f: load_config(f / "run.yaml"), 8),
        "domain manifest": Target("manifest.json", _manifest, domain, 8),
        "ends of documents": Target("heldout.ends", _unlisted, domain),
        "calibration manifest": Target("manifest.json", _manifest, calibration),
        "tokenizer.json": Target("tokenizer.json", _json, tokenizer, 8),
        "tokenizer_config.json": Target("tokenizer_config.json", _json, tokenizer),
        **{kind: Target(file, breaks, chat, 1) for kind, (file, breaks) in CHATS.items()},
        "mark": Target("prismoe.json", _json, read_mark),
        "run state": Target("run.json", _json, read_state),
        "calibrated sequences": Target(SEQUENCES, broken_sealed, sequences),
        "routing trace": Target("trace.safetensors", _inside("trace"), RoutingTrace.open, 8),
        "statistics": Target(
            "layer.safetensors", _inside("scalars"), lambda f: NeuronStats.load(f / "layer.safetensors")
        ),
        "conversations": Target("talk.jsonl", _lines, lambda f: list(read_conversations(f / "talk.jsonl"))),
        "text": Target("text.jsonl", _lines, lambda f: list(read_documents(f / "text.jsonl"))),
    }


def _json(whole: bytes, draw: random.Random) -> bytes:
    return broken_bytes(whole, draw) if draw.random() < 0.2 else broken_json(json.loads(whole), draw)


def _manifest(whole: bytes, draw: random.Random) -> bytes:
    """As a stranger would write it: without the line that only tells accidents."""
    body: dict[str, Any] = json.loads(whole)
    if draw.random() < 0.7:
        del body["sha256"]
    return broken_json(body, draw)


CHATS: dict[str, tuple[str, Breaks]] = {
    "tokenizer.json for chats": ("tokenizer.json", _json),
    "tokenizer_config.json for chats": ("tokenizer_config.json", _json),
    "special_tokens_map.json": ("special_tokens_map.json", _json),
    "chat template": ("chat_template.jinja", broken_bytes),
}


def _inside(key: str) -> Breaks:
    return lambda whole, draw: broken_sealed(whole, draw, inner=key)


def _unlisted(whole: bytes, draw: random.Random) -> bytes:
    return broken_bytes(whole, draw)


def _lines(whole: bytes, draw: random.Random) -> bytes:
    lines = whole.split(b"\n")
    at = draw.randrange(len(lines) - 1)
    lines[at] = _json(lines[at], draw).replace(b"\n", b" ")
    return b"\n".join(lines)


def _yaml(whole: bytes, draw: random.Random) -> bytes:
    import yaml

    if draw.random() < 0.5:
        return broken_json(yaml.safe_load(whole), draw)  # JSON is YAML
    lines = whole.split(b"\n")
    at = draw.randrange(len(lines))
    kind = draw.randrange(4)
    if kind == 0:
        lines.insert(at, draw.choice(lines))
    elif kind == 1:
        lines[at] = b" " * draw.randrange(5) + lines[at]
    elif kind == 2:
        lines[at] += draw.choice((b" &a", b" *a", b" !!python/name:os.system", b" |", b": x", b" {", b" 1e999", b"\t"))
    else:
        return broken_bytes(whole, draw)
    return b"\n".join(lines)
