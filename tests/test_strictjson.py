"""JSON of strangers: each way in which it is not what it should be is one line that names the file."""

from pathlib import Path

import pytest

from prismoe.checkpoint.family import dense_config
from prismoe.data.reference import Reference
from prismoe.errors import InputError
from prismoe.state import read_state
from prismoe.strictjson import parse_json, read_json
from prismoe.verify.certificate import Certificate
from tests.handmade import CONFIG


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -1e999}', "number -1e999; needed one that is finite"),
        ('{"a": ["\\ud800"]}', "not valid JSON ('utf-8' codec can't encode character '\\ud800'"),
        ('{"\\uDfff": 1}', "not valid JSON ('utf-8' codec"),
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "not valid JSON (maximum recursion depth"),
        ("9" * 5000, "not valid JSON (Exceeds the limit"),
        ("[]", "JSON list; needed an object"),
    ],
)
def test_refused(text: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_json(text.encode(), where="x.json")
    assert str(caught.value).startswith(f"x.json: {line}")


def test_what_is_read_can_be_written_again() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00", "b": 1e308}', where="x") == {"a": "😀", "b": 1e308}


def test_a_pipe_and_a_file_that_is_too_large_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(40_000_000)
    with pytest.raises(InputError, match=r"large\.json: 40000000 bytes; needed at most 32000000 of JSON"):
        read_json(tmp_path / "large.json")
    with pytest.raises(InputError, match=r"/dev/null: not a file; needed JSON"):
        read_json(Path("/dev/null"))


def test_more_layers_than_any_model_has_are_refused_before_their_tensors_are_named() -> None:
    with pytest.raises(InputError, match=r"num_hidden_layers: 2097152; needed a positive whole number, at most 10000"):
        dense_config({**CONFIG, "num_hidden_layers": 2**21}, where="config.json")


def test_every_reader_of_a_folder_says_it_in_a_line(tmp_path: Path) -> None:
    bomb = '{"kind":' + "[" * 100_000 + "]" * 100_000 + "}"
    for name in ("certificate.json", "run.json", "reference.json"):
        (tmp_path / name).write_text(bomb)
    with pytest.raises(InputError, match=r"certificate\.json: not valid JSON"):
        Certificate.read(tmp_path)
    with pytest.raises(InputError, match=r"run\.json: not a readable run state"):
        read_state(tmp_path)
    with pytest.raises(InputError, match=r"reference\.json: not valid JSON"):
        Reference.read(tmp_path / "reference.json")
