"""Benchmark items as text: each row of a JSONL file is its question followed by its right answer, one document."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismoe.data.blocks import read_lines
from prismoe.errors import InputError

__all__ = ["Item", "benchmark_files", "item_text", "read_items"]

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
PLAIN = ("content", "text")
QUESTION = ("passage", "context", "ctx", "support", "goal", "sentence", "query", "question", "Question")
ANSWER = ("correct_answer", "answer", "answerKey", "label", "gold", "target", "Best Answer")
CHOICES = ("choices", "endings", "options")
PAIRS = (("sol1", "sol2"), ("option1", "option2"))
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """The text of one row, and where it stands."""

    text: str
    where: str


def benchmark_files(given: str | Sequence[str]) -> dict[str, Path]:
    """Files by the name they have as domains (that of the file): paths, globs, or folders for every JSONL file in them.

    Raises:
        InputError: a file that is not there, is no JSONL, or two of one name.
    """
    found: dict[str, Path] = {}
    for pattern in [given] if isinstance(given, str) else given:
        paths = [Path(pattern)]
        if paths[0].is_dir():
            paths = sorted(path for path in paths[0].iterdir() if path.name.endswith(SUFFIXES))
        elif not paths[0].is_file():
            paths = sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207 - patterns may be absolute
        if not paths:
            raise InputError("no benchmark file", where=pattern, needed=" ".join(SUFFIXES))
        for path in paths:
            name = path.name.partition(".")[0]
            if not path.name.endswith(SUFFIXES):
                raise InputError(
                    "not a kind of benchmark file that is read", where=str(path), needed=" ".join(SUFFIXES)
                )
            if name in found and found[name] != path:
                raise InputError(
                    f"a second benchmark called {name}", where=str(path), hint=f"the other is {found[name]}"
                )
            found[name] = path
    return found


def read_items(path: Path) -> Iterator[Item]:
    """Every row of a file that has a text.

    Raises:
        InputError: not readable, a row that is no JSON object, or a file without one question.
    """
    empty = True
    for number, (line, _) in enumerate(read_lines(path), start=1):
        where = f"{path}:{number}"
        if line is not None and not line.strip():
            continue
        try:
            row = json.loads(line or b"")
        except (ValueError, RecursionError) as error:
            raise InputError(f"invalid JSON ({error})", where=where) from error
        if not isinstance(row, dict):
            raise InputError(f"a JSON {type(row).__name__}", where=where, needed="one JSON object a line")
        if text := item_text(row):
            empty = False
            yield Item(text, where)
    if empty:
        names = ", ".join((*PLAIN, *QUESTION))
        raise InputError("no text in any row", where=str(path), needed=f"a field called one of {names}")


def item_text(row: Mapping[str, Any]) -> str:
    """`content` or `text` where there is one; else what is asked and the right answer to it, parted by a space.

    The wrong choices are left out: they are no text that anybody would write.
    """
    for name in PLAIN:
        if isinstance(row.get(name), str):
            return str(row[name])
    asked = [row[name] for name in QUESTION if isinstance(row.get(name), str) and row[name].strip()]
    answer = _answer(row) if asked else ""
    sentence = row.get("sentence")
    if isinstance(sentence, str) and answer and "_" in sentence:  # WinoGrande: the answer belongs where the blank is
        return sentence.replace("_", answer)
    return " ".join([*asked, answer]).strip()


def _answer(row: Mapping[str, Any]) -> str:
    value = next((row[name] for name in ANSWER if name in row), "")
    texts, labels = _choices(row)
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not texts:
        return value if isinstance(value, str) else ""
    if isinstance(value, str) and value.upper() in labels:
        return texts[labels.index(value.upper())]
    number = int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else -1
    return texts[number] if 0 <= number < len(texts) else ""


def _choices(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The choices and what each is called in the answer: letters, or numbers from 1 where the answer is a text."""
    for name in CHOICES:
        found = row.get(name)
        if isinstance(found, dict) and isinstance(found.get("text"), list):
            return list(map(str, found["text"])), [str(label).upper() for label in found.get("label", ())]
        if isinstance(found, list):
            return list(map(str, found)), list(_LETTERS)
    for pair in PAIRS:
        if all(isinstance(row.get(name), str) for name in pair):
            return [str(row[name]) for name in pair], ["1", "2"]
    return [], []
