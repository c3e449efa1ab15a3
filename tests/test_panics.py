"""What a tokenizer library raises, a panic below Python among it, is one line that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from prismoe.data.panics import told
from prismoe.errors import InputError, UsageError
from tests.tiny import tiny_tokenizer


def test_a_panic_below_python_names_the_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_tokenizer(tmp_path) / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    path.write_text(json.dumps(settings))
    tokenizer = Tokenizer.from_file(str(path))
    named = r"tokenizer\.json: not a readable fast tokenizer \(.*stride.*\)"
    with pytest.raises(InputError, match=named) as raised, told(path):
        tokenizer.encode("a girl who liked to play")
    assert raised.value.__cause__ is not None
    assert not isinstance(raised.value.__cause__, Exception), "a panic is none: `except Exception` would miss it"
    assert "panicked" in capfd.readouterr().err


def test_an_exception_of_the_library_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": {"type": "Unigram", "vocab": [], "unk_id": 9}}')
    with pytest.raises(InputError, match=r"tokenizer\.json: not .* tokenizer \(.*EmptyVocabulary"), told(path):
        Tokenizer.from_file(str(path))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), UsageError("ours")])
def test_what_is_not_the_librarys_goes_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, told("tokenizer.json"):
        raise error
    assert raised.value is error


def test_an_error_without_words_has_its_name() -> None:
    with pytest.raises(InputError, match=r"\(MemoryError\)"), told("tokenizer.json"):
        raise MemoryError
