"""Instruction data: every published form, every refusal counted with its place, a split that knows no order."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import zstandard

from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, UsageError
from prismoe.tune.conversations import Conversation, Message, Refusals, find_files, read_conversations
from prismoe.tune.text import is_heldout

HI = (Message("user", "hi"), Message("assistant", "yo"))
GPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path, form: str = "auto") -> list[tuple[Message, ...]]:
    return [conversation.messages for conversation in read_conversations(path, form=form)]


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("sharegpt", {"id": 1, "conversations": GPT}, HI),
        (
            "sharegpt",
            {"conversations": [{"from": "system", "value": "Be."}, *GPT]},
            (Message("system", "Be."), *HI),
        ),
        ("sharegpt", {"conversations": [{"from": "system", "value": " "}, *GPT, *GPT]}, HI + HI),
        ("messages", {"prompt": "hi", "prompt_id": "0", "messages": CHAT}, HI),  # Deita
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "h"}, "i"]}, CHAT[1]]},
            HI,
        ),
        ("messages", {"messages": [{"role": "developer", "content": "Be."}, *CHAT]}, (Message("system", "Be."), *HI)),
        ("alpaca", {"instruction": "hi", "input": "", "output": "yo"}, HI),
        ("alpaca", {"instruction": "Say:", "input": "a\nb", "response": "yo"}, (Message("user", "Say:\na\nb"), HI[1])),
        ("alpaca", {"instruction": "Say:", "context": "a", "response": "yo"}, (Message("user", "Say:\na"), HI[1])),
        (
            "alpaca",
            {"instruction": "hi", "output": "yo", "system": "Be.", "history": [["a", "b"]]},
            (Message("system", "Be."), Message("user", "a"), Message("assistant", "b"), *HI),
        ),
        ("prompt_response", {"prompt": "hi", "response": "yo"}, HI),
        ("prompt_response", {"prompt": [CHAT[0]], "completion": [CHAT[1]]}, HI),
        ("preferred", {"conversations": GPT[:1], "chosen": GPT[1], "rejected": GPT[0]}, HI),
        ("preferred", {"prompt": "hi", "chosen": CHAT, "rejected": CHAT}, HI),
        ("preferred", {"prompt": "hi", "chosen": "yo", "rejected": "no"}, HI),
        ("preferred", {"messages": CHAT, "label": True}, HI),
        ("preferred", {"prompt": "hi", "completion": "yo", "label": True}, HI),
    ],
)
def test_each_form_says_the_same(tmp_path: Path, form: str, row: dict[str, Any], expected: Any) -> None:
    path = write(tmp_path / "a.jsonl", row)
    assert read(path, form) == [expected]
    if form == "preferred":
        with pytest.raises(InputError, match=r"a\.jsonl:1: a row of preferences .* \(hint: form=preferred takes"):
            read(path)
    else:
        (found,) = read_conversations(path)
        assert (found.messages, found.form, found.where) == (expected, form, f"{path}:1")


def test_compressed_files_and_marks_read_alike(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps({"conversations": GPT}) + "\r\n\r\n \n" + json.dumps({"conversations": GPT * 2})
    for name, data in {
        "a.jsonl": text.encode(),
        "b.jsonl.gz": gzip.compress(text.encode()),
        "c.jsonl.zst": zstandard.compress(text.encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        found = list(read_conversations(tmp_path / name))
        assert [(c.messages, c.line) for c in found] == [(HI, 1), (HI + HI, 4)], name
    assert [path.name for path in find_files([tmp_path / "*.jsonl*"])] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst"]
    with pytest.raises(UsageError, match="is named twice"):
        find_files([tmp_path / "a.jsonl", tmp_path / "*.jsonl"])
    with pytest.raises(InputError, match=r"a\.json: not a kind of file that is read; needed \.jsonl"):
        find_files([write(tmp_path / "a.json", "[]")])


BAD: list[tuple[str, Any, str]] = [
    ("invalid JSON", '{"conversations": [}', "column 20"),
    ("not an object", "[1]", "a JSON list"),
    ("not UTF-8", b'{"conversations": "\xff"}', "byte 0xff"),
    ("no assistant turn", {"conversations": GPT[:1]}, "no assistant turn"),
    ("no assistant turn", {"conversations": []}, "no assistant turn"),
    ("roles out of order", {"conversations": GPT[::-1]}, "turn 1 is assistant; needed system or user"),
    ("roles out of order", {"conversations": [*GPT, GPT[1]]}, "turn 3 is assistant; needed user"),
    ("roles out of order", {"conversations": [GPT[0], *GPT]}, "turn 2 is user; needed assistant"),
    ("roles out of order", {"conversations": [*GPT, {"from": "system", "value": "x"}]}, "turn 3 is system"),
    ("empty text", {"conversations": [GPT[0], {"from": "gpt", "value": " \n"}]}, r"turn 2 \(assistant\) is empty"),
    ("unknown role", {"conversations": [*GPT, {"from": "tool", "value": "x"}]}, "unknown role 'tool'"),
    ("unknown role", {"conversations": [{"value": "x"}]}, "unknown role None"),
    ("not a turn", {"conversations": ["hi", "yo"]}, "a turn that is a JSON str"),
    ("not text", {"conversations": [{"from": "human", "value": None}]}, "a JSON NoneType"),
    (
        "not text",
        {"conversations": [{"from": "human", "value": [{"type": "image_url", "image_url": {}}]}]},
        "a part of type 'image_url'",
    ),
    (
        "not a character",
        '{"conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "x"}]}',
        "",
    ),
    ("too long", {"conversations": [GPT[0], {"from": "gpt", "value": "x" * (4 << 20)}]}, "4,194,306 characters"),
    ("another form", {"messages": CHAT}, r"not in the form sharegpt \(fields: messages\)"),
    ("another form", {"text": "x"}, "not in the form sharegpt"),
]


@pytest.mark.parametrize(("reason", "row", "told"), BAD)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, reason: str, row: Any, told: str) -> None:
    path = tmp_path / "a.jsonl"
    line = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    good = json.dumps({"conversations": GPT}).encode()
    path.write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(BadDocument, match=rf"a\.jsonl:2: .*{told}") as caught:
        list(read_conversations(path))
    assert "\n" not in str(caught.value)
    refusals = Refusals()
    found = list(read_conversations(path, on_bad=lambda error: refusals.add(error.reason, error.where)))
    assert [conversation.line for conversation in found] == [1, 3]
    assert (refusals.counts, refusals.first) == ({reason: 1}, {reason: f"{path}:2"})


def test_rows_left_out_as_asked_and_last_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": CHAT, "label": True}, {"messages": CHAT, "label": False})
    with pytest.raises(BadDocument, match="labelled false") as caught:
        read(path, "preferred")
    assert caught.value.reason == "not the preferred answer"
    (found,) = read_conversations(write(tmp_path / "b.jsonl", {"conversations": [*GPT, GPT[0]]}))
    assert (found.messages, found.unanswered) == (HI, True)


def test_a_file_of_no_known_form(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl:1: a row of no known form \(fields: text\); needed conversations"):
        read(write(tmp_path / "a.jsonl", {"text": "x"}, {"conversations": GPT}))
    with pytest.raises(InputError, match=r"b\.jsonl: no conversations in it"):
        read(write(tmp_path / "b.jsonl", ""))
    with pytest.raises(UsageError, match=r"unknown form 'shargpt'.*did you mean sharegpt\?"):
        read(tmp_path / "a.jsonl", "shargpt")


def test_the_limit_of_refusals_is_a_share() -> None:
    refusals = Refusals()
    for number in range(3):
        refusals.add(("empty text", "unknown role")[number // 2], f"a.jsonl:{number + 5}")
    refusals.check(300, limit=0.01)
    with pytest.raises(InputError) as caught:
        refusals.check(299, limit=0.01)
    assert str(caught.value) == (
        "a.jsonl:5: 3 of 299 rows refused, 1 %: 2 empty text (first a.jsonl:5), 1 unknown role (first a.jsonl:7); "
        "needed at most 1 % (hint: mend the rows, or allow more with max_refused)"
    )
    Refusals().check(0, limit=0.0)


def test_a_conversation_is_held_out_by_what_it_says() -> None:
    made = [Conversation((Message("user", f"q{n}"), Message("assistant", "a")), "x", n) for n in range(4000)]
    held = {c.line for c in made if is_heldout(c, share=0.1, seed=3)}
    assert 340 <= len(held) <= 460  # 400 ± 3 deviations of 19
    elsewhere = [Conversation(c.messages, "other", 7 * c.line) for c in reversed(made)]
    assert {c.line // 7 for c in elsewhere if is_heldout(c, share=0.1, seed=3)} == held
    assert {c.line for c in made if is_heldout(c, share=0.2, seed=3)} > held
    assert {c.line for c in made if is_heldout(c, share=0.1, seed=4)} != held
    assert not any(is_heldout(c, share=0.0, seed=3) for c in made)
    # Where one message ends and the next begins is part of what is said.
    one, other = (
        Conversation((Message("user", a), Message("assistant", b)), "x", 1) for a, b in (("ab", "c"), ("a", "bc"))
    )
    assert one.digest != other.digest


@pytest.mark.parametrize(
    ("name", "form", "rows", "messages"),
    [
        ("alpaca_gpt4_en_demo", "alpaca", 998, {"user": 998, "assistant": 998}),
        ("gpteacher_codegen", "alpaca", 1492, {"user": 1492, "assistant": 1492}),
        ("gpteacher_roleplay", "alpaca", 999, {"user": 999, "assistant": 999}),
        ("dolly_hhrlhf_small", "prompt_response", 995, {"user": 995, "assistant": 995}),
        ("deita_subset", "messages", 5, {"user": 78, "assistant": 78}),
        ("oasst_en_100", "sharegpt", 100, {"user": 185, "assistant": 185}),
        ("sharegpt_mix", "sharegpt", 550, {"system": 80, "user": 1061, "assistant": 1061}),
        # 295 pairs: 257 answers before the chosen one; of 300 labelled rows half are labelled true
        ("dpo_en_demo", "preferred", 295, {"system": 80, "user": 552, "assistant": 552}),
        ("kto_en_demo", "preferred", 150, {"user": 246, "assistant": 246}),
    ],
)
def test_real_files(shared: Path, name: str, form: str, rows: int, messages: dict[str, int]) -> None:
    path = shared / "sft" / f"{name}.jsonl"
    bad: Counter[str] = Counter()
    asked = form if form == "preferred" else "auto"
    found = list(read_conversations(path, form=asked, on_bad=lambda error: bad.update([error.reason])))
    assert len(found) == rows
    assert {conversation.form for conversation in found} == {form}
    assert Counter(m.role for conversation in found for m in conversation.messages) == messages
    assert bad == ({"not the preferred answer": 150} if name == "kto_en_demo" else {})
    if form == "preferred":
        with pytest.raises(InputError, match="a row of preferences"):
            read(path)


def test_names_on_the_hub_are_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    cache = tmp_path / "datasets--someone--talks"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee")
    folder = cache / "snapshots" / "c0ffee" / "data"
    folder.mkdir(parents=True)
    write(folder / "b.jsonl", {"messages": CHAT})
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"conversations": GPT}).encode()))
    write(folder / "readme.md", "not a conversation")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    own = write(tmp_path / "own.jsonl", {"messages": CHAT})
    found = find_files(["hf://datasets/someone/talks/data/*.jsonl*", own], offline=True)
    assert [path.name for path in found] == ["a.jsonl.gz", "b.jsonl", "own.jsonl"]
    assert [read(path) for path in found] == [[HI]] * 3
    assert find_files("hf://datasets/someone/talks@main/data/b.jsonl", offline=True) == [folder / "b.jsonl"]
    with pytest.raises(UsageError, match=r"b\.jsonl is named twice"):
        find_files(["hf://datasets/someone/talks/data/b.jsonl", "hf://datasets/someone/talks/data/*.jsonl"])
    with pytest.raises(InputError, match=r"readme\.md: not a kind of file that is read; needed \.jsonl "):
        find_files("hf://datasets/someone/talks/data/*.md", offline=True)
    with pytest.raises(InputError, match=r"hf://datasets/someone/gone/a\.jsonl: cannot be had from the hub"):
        find_files("hf://datasets/someone/gone/a.jsonl", offline=True)


def test_a_file_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as raised:
        find_files("deita-6k.jsonl")
    assert str(raised.value) == f"tune.data: no file deita-6k.jsonl (hint: looked for from {tmp_path})"
