"""Small text files for tests of the data path, and `prepare` of one domain made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prismoe.data.prepare import DomainSource, Prepared, prepare

TEXTS = ["Once upon a time", "def add(first, second):\n    return first", "näïve \U0001f600 </s> end", "x"]


def jsonl(path: Path, texts: list[str], *, field: str = "content") -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def one(tmp_path: Path, tokenizer: Path, train: Path, heldout: Path | None = None, **more: Any) -> Prepared:
    """Prepare `train` as the domain `out/d` below `tmp_path`."""
    heldout = heldout or jsonl(tmp_path / "heldout.jsonl", TEXTS)
    source = DomainSource((str(train),), (str(heldout),))
    return prepare({"d": source}, tokenizer=tokenizer, out=tmp_path / "out", **more)
