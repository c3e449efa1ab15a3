"""What a tokenizer library raises, a panic below Python among it, is one line that names the file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from prismoe.checkpoint import Checkpoint
from prismoe.cli import _for_people, _panic
from prismoe.errors import InputError, UsageError
from prismoe.panics import read_tokenizer, told
from prismoe.tune.render import open_template
from prismoe.tune.rows import open_tokenizer
from prismoe.verify.sample import sample_ids
from tests.tiny import tiny_tokenizer


@pytest.fixture
def panics(tmp_path: Path) -> Path:
    """A tokenizer.json that is read, and panics when it encodes."""
    path = tiny_tokenizer(tmp_path) / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}
    path.write_text(json.dumps(settings))
    return path


def test_a_panic_below_python_names_the_file(panics: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = panics
    tokenizer = Tokenizer.from_file(str(path))
    named = r"tokenizer\.json: not a readable fast tokenizer \(.*stride.*\)"
    with pytest.raises(InputError, match=named) as raised, told(path):
        tokenizer.encode("a girl who liked to play")
    assert raised.value.__cause__ is not None
    assert not isinstance(raised.value.__cause__, Exception), "a panic is none: `except Exception` would miss it"
    assert "panicked" in capfd.readouterr().err


def test_readers_of_a_model_folder_say_it_as_well(panics: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: not a readable fast tokenizer \(.*stride"):
        sample_ids(panics.parent, num_tokens=8, vocab_size=128)
    (panics.parent / "tokenizer_config.json").write_text("[]")
    (panics.parent / "config.json").write_text("{}")
    with pytest.raises(InputError, match=rf"{panics.parent}: not a readable fast tokenizer"):
        open_tokenizer(Checkpoint.open(panics.parent))


def test_one_that_nobody_caught_is_no_traceback(panics: Path) -> None:
    with pytest.raises(BaseException, match="stride") as raised:
        Tokenizer.from_file(str(panics)).encode("a girl who liked to play")
    assert _panic(raised.value)
    assert not _panic(SystemExit(3))
    line = r"a library: failed below Python \(.*stride.*\) \(hint: is a tokenizer.json damaged\?\)"
    assert re.fullmatch(line, str(_for_people(raised.value)))


def test_an_id_that_would_take_all_memory_is_refused(tmp_path: Path) -> None:
    """Below Python 16 GiB of ids without a token would be written down, which ends the process."""
    path = tiny_tokenizer(tmp_path) / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["vocab"]["l"] = 2**32 - 1
    path.write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"tokenizer\.json: a token of id 4294967295; needed ids up to 4194304"):
        read_tokenizer(path)


def test_a_special_token_without_a_name_is_a_line(tmp_path: Path) -> None:
    """The stock class looks for the id of its unknown token in that of its unknown token."""
    tiny_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "unk_token": {}}')
    (tmp_path / "config.json").write_text("{}")
    tokenizer = open_tokenizer(Checkpoint.open(tmp_path))
    with pytest.raises(InputError, match=rf"template model of {tmp_path}: .*(recursion|no chat template)"):
        open_template("model", tokenizer=tokenizer)


def test_a_tokenizer_larger_than_any_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(200_000_000)
    with pytest.raises(InputError, match=r"tokenizer\.json: 200000000 bytes; needed a tokenizer of at most 128000000"):
        read_tokenizer(tmp_path / "tokenizer.json")


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
