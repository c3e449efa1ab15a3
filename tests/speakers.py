"""A tiny mixture and its dense parent that chat tests talk to, and the vicuna prompt written by hand."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from prismoe.convert import convert
from prismoe.plan import make_plan
from tests.tiny import tiny_dense

TEMPLATE = "vicuna_v1_1"


@cache
def models() -> tuple[Path, Path]:
    """(dense, mixture of 4 experts, top-2) folders; look, do not write."""
    folder = Path(tempfile.mkdtemp(prefix="prismoe-chat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dense = tiny_dense(folder / "dense")
    convert(dense, make_plan(dense, num_experts=4, top_k=2), target="mixtral", out=folder / "moe")
    return dense, folder / "moe"


def changed(folder: Path, name: str = "config.json", **keys: object) -> Path:
    """A copy of the mixture with other keys in one of its JSON files."""
    shutil.copytree(models()[1], folder, ignore=shutil.ignore_patterns("manifest.json", "prismoe.json"))
    path = folder / name
    settings = json.loads(path.read_bytes()) if path.is_file() else {}
    path.write_text(json.dumps({**settings, **keys}))
    return folder


def vicuna(turns: Sequence[str], *, system: str = "") -> str:
    """Questions and answers in turn, up to where the next answer begins."""
    text = f"{system} "
    for place, turn in enumerate(turns):
        text += f"ASSISTANT: {turn}</s>" if place % 2 else f"USER: {turn} "
    return text + "ASSISTANT:"
