"""The line that every error is: where, what, what was needed and one hint; what a file said is shown, not obeyed."""

from __future__ import annotations

import pytest

from prismoe.errors import InputError, NumericalError, PrismoeError, ResourceError, UsageError


def test_the_parts_of_the_line() -> None:
    error = InputError("3 layers", where="config.json", needed="4", hint="convert it again")
    assert str(error) == "config.json: 3 layers; needed 4 (hint: convert it again)"
    assert str(InputError("3 layers")) == "3 layers"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("a\x1b]0;owned\x07b", r"a\x1b]0;owned\x07b"),  # sets a terminal's title
        ("a\x1b[2Jb", r"a\x1b[2Jb"),  # clears it
        ("\u202ecod.exe", r"\u202ecod.exe"),  # turns the reading direction
        ("a\r\nb\tc\x0bd", "a b c d"),
        ("a\x00\x7f\x9bb", r"a\x00\x7f\x9bb"),
        ("\U000e0041\ud800", r"\U000e0041\ud800"),  # a tag and half a pair, which no terminal can be sent
        ("größer als ∑ 模型 👍", "größer als ∑ 模型 👍"),
    ],
)
@pytest.mark.parametrize("kind", [InputError, ResourceError, NumericalError])
def test_what_a_file_said_cannot_act_on_a_terminal(kind: type[PrismoeError], said: str, shown: str) -> None:
    for place in ("found", "where", "needed", "hint"):
        line = str(kind(**{"found": "x", place: said}))
        assert shown in line
        assert line.isprintable()
        line.encode()


def test_a_line_has_an_end_and_its_last_words_stay() -> None:
    line = str(InputError("long " * 10_000, where="model.safetensors", needed="less"))
    assert len(line) <= 1000
    assert line.startswith("model.safetensors: long long")
    assert line.endswith("long ; needed less")


def test_problems_of_a_config_are_a_line_each_and_each_is_escaped() -> None:
    told = str(UsageError("run.yaml:1: x\x1b[2J\nrun.yaml:2: y"))
    assert told == "run.yaml:1: x\\x1b[2J\nrun.yaml:2: y"
    assert "\n" not in str(InputError("one\ntwo"))
