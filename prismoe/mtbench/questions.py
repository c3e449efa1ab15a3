"""FastChat's files: questions of two turns, answers (also the reference ones) and the judge's prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any

from prismoe.data.blocks import read_lines
from prismoe.data.reader import read_object
from prismoe.errors import InputError

__all__ = ["NEED_REFERENCE", "JudgePrompt", "Question", "read_answers", "read_judge_prompts", "read_questions"]

NEED_REFERENCE = ("math", "reasoning", "coding")
TEMPERATURES = {
    **{"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1},
    **dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0),
}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Question:
    """One question with its one or two turns."""

    question_id: int
    category: str
    turns: tuple[str, ...]

    @property
    def temperature(self) -> float:
        """At which it is to be answered, by its category."""
        return TEMPERATURES.get(self.category, OTHER_TEMPERATURE)


@dataclass(frozen=True)
class JudgePrompt:
    """A prompt for grading one answer, in Python's format language; only names of the benchmark's fields."""

    name: str
    system: str
    template: str
    where: str

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with its fields filled in.

        Raises:
            InputError: a field that there is no value for.
        """
        parts = []
        for text, field, form, conversion in Formatter().parse(self.template):
            parts.append(text)
            if field is None:
                continue
            if field not in values or form or conversion:
                raise InputError(f"field {{{field}}}", where=self.where, needed="one of " + ", ".join(sorted(values)))
            parts.append(values[field])
        return "".join(parts)


def read_questions(path: Path) -> tuple[Question, ...]:
    """Questions in the order of the file.

    Raises:
        InputError: not readable, a row that is no question, or an id that is there twice; with file and line.
    """
    found: dict[int, Question] = {}
    for row, where in _rows(path):
        number, turns = row.get("question_id"), row.get("turns")
        if not isinstance(number, int) or not _texts(turns) or not isinstance(row.get("category"), str):
            raise InputError("not a question", where=where, needed="question_id, category and one or two turns")
        if number in found:
            raise InputError(f"question {number} again", where=where)
        found[number] = Question(number, row["category"], tuple(turns or ()))
    return tuple(found.values())


def read_answers(path: Path) -> dict[int, tuple[str, ...]]:
    """The turns of the first choice of each answer, by question.

    Raises:
        InputError: not readable, or a row that is no answer, with file and line.
    """
    found = {}
    for row, where in _rows(path):
        choices = row.get("choices")
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns") if isinstance(first, dict) else None
        if not isinstance(row.get("question_id"), int) or not _texts(turns, empty=True):
            raise InputError("not an answer", where=where, needed="question_id and choices[0].turns")
        found[row["question_id"]] = tuple(turns or ())
    return found


def read_judge_prompts(path: Path) -> dict[str, JudgePrompt]:
    """The prompts for grading single answers, by name.

    Raises:
        InputError: not readable, a prompt without its texts, or one of the four that are used is missing.
    """
    found = {}
    for row, where in _rows(path):
        if row.get("type") != "single":
            continue
        texts = [row.get(name) for name in ("name", "system_prompt", "prompt_template")]
        if not all(isinstance(text, str) for text in texts) or row.get("output_format") != "[[rating]]":
            needed = "name, system_prompt, prompt_template, and output_format [[rating]]"
            raise InputError("not a judge's prompt", where=where, needed=needed)
        name, system, template = (str(text) for text in texts)
        found[name] = JudgePrompt(name, system, template, where)
    wanted = {f"single{kind}-v1{turns}" for kind in ("", "-math") for turns in ("", "-multi-turn")}
    if missing := sorted(wanted - found.keys()):
        raise InputError(f"no prompt {missing[0]}", where=str(path), needed="FastChat's judge_prompts.jsonl")
    return found


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    found = False
    for number, (line, _) in enumerate(read_lines(Path(path)), start=1):
        if line is None or line.strip():
            where = f"{path}:{number}"
            found = True
            yield read_object(line or b"", where, first=number == 1), where
    if not found:
        raise InputError("nothing in it", where=str(path))


def _texts(value: Any, *, empty: bool = False) -> bool:
    texts = isinstance(value, list) and 1 <= len(value) <= 2 and all(isinstance(text, str) for text in value)
    return texts and (empty or all(text.strip() for text in value))
