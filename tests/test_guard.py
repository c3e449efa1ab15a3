"""Strangers' templates: what cannot teach is refused, and what would do harm ends in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from prismoe.data.reader import BadDocument
from prismoe.errors import InputError
from prismoe.tune.conversations import Conversation, Message
from prismoe.tune.guard import Guard
from prismoe.tune.render import open_template, render, render_all
from tests.bombs import BOMBS
from tests.chats import TURNS
from tests.tiny import tiny_tokenizer


@pytest.fixture
def tiny(tmp_path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer", vocab_size=300))


LOOP = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        # the header of an answer is in no generation prompt, so that it would be learned
        (LOOP, "no generation marks, and the answer's text does not follow the generation prompt"),
        # a last answer is written otherwise than one before (Qwen3's)
        (
            "{% for m in messages %}{{ m['role'] + ':' }}"
            "{% if loop.last and m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}"
            "{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}",
            "no generation marks, and what it writes for a conversation's beginning is not how it begins",
        ),
        # the end token is outside the block: never learned
        (
            "{% for m in messages %}{{ m['role'] + ':' }}{% generation %}{{ m['content'] }}{% endgeneration %}"
            "{{ eos_token }}{% endfor %}",
            "the template marks 4 of 2 answers",
        ),
        (
            "{% for m in messages %}{{ m['role'] + ':' }}{% if m['role'] == 'assistant' %}"
            "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
            "{{ eos_token }}{% endfor %}",
            r"an answer does not end with a token of its own; .* the end token belongs before {% endgeneration %}",
        ),
        (
            "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
            "an answer does not end with a token of its own; needed an end-of-turn token",
        ),
        ("{{ bos_token + bos_token }}" + LOOP.replace("m['role'] + ':' + ", ""), "writes the start token twice"),
        ("{% generation %}{% generation %}{% endgeneration %}{% endgeneration %}", "a generation block within another"),
        ("{% for m in messages %}", "line 1: .*"),
        ("{{ raise_exception('no\n system\x1b[2J') }}", r"refused by the template \(no system\[2J\)"),
        ("{{ nothing.at.all }}", r"refused by the template \('nothing' is undefined\)"),
    ],
)
def test_templates_that_cannot_teach(tiny: PreTrainedTokenizerFast, tmp_path: Path, source: str, told: str) -> None:
    path = tmp_path / "own.jinja"
    path.write_text(source)
    with pytest.raises(InputError, match=rf"template \S+own\.jinja: {told}") as caught:
        open_template(str(path), tokenizer=tiny)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_line(tiny: PreTrainedTokenizerFast, name: str) -> None:
    tiny.chat_template, told = BOMBS[name]
    with pytest.raises(InputError, match=f"template model of .*tokenizer: .*({told})") as caught:
        open_template("model", tokenizer=tiny)
    assert "\n" not in str(caught.value)


def test_a_late_bomb_names_the_conversation() -> None:
    source = "{% for m in messages %}{{ m.content * 9 ** (m.content | length) }}{% endfor %}"
    with Guard(source, variables={}, where="template late") as guard:
        assert guard.render(TURNS[:1], prompt=True).text == "hi" * 81
        with pytest.raises(InputError, match=r"template late: more than 512 MiB of memory \(hint: at a\.jsonl:9\)"):
            guard.render(TURNS, where="a.jsonl:9", prompt=True)
        with pytest.raises(InputError, match="the process of this template has ended"):
            guard.render(TURNS)


def test_one_conversation_whose_answers_are_not_found_is_counted(tiny: PreTrainedTokenizerFast) -> None:
    ask = "{% if add_generation_prompt %}{{ 'A:' }}{% endif %}"
    unmarked = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}{{ 'A:' }}"
        "{{ m.content.split('##')[0] + eos_token }}{% endif %}{% endfor %}" + ask
    )
    marked = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% elif '##' in m.content %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    odd = Conversation((TURNS[0], Message("assistant", "a##b")), "odd", 4)
    for source, told in ((unmarked, "does not follow the generation prompt"), (marked, "marks 0 of 1 answers")):
        tiny.chat_template = source
        with open_template("model", tokenizer=tiny) as template:
            good, bad = render_all([Conversation(TURNS, "good", 1), odd], template, max_len=99)
            assert not isinstance(good, BadDocument)
            assert isinstance(bad, BadDocument)
            assert (bad.reason, bad.where) == ("answers not told from the rest", "odd:4")
            assert told in bad.found


def test_the_process_has_no_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRISMOE_SECRET", "x")
    with Guard("{{ strftime_now('%d %b %Y') }}", variables={}, where="t") as guard:
        assert guard.render(TURNS, prompt=True).text == "26 Jul 2024"
        process = Path(f"/proc/{guard._process.pid}")
        assert b"SECRET" not in (process / "environ").read_bytes()
        limits = {line[:24].strip(): line[24:].split()[0] for line in (process / "limits").read_text().splitlines()}
        assert limits["Max address space"] == str(512 << 20)
        assert (limits["Max open files"], limits["Max file size"], limits["Max core file size"]) == ("3", "0", "0")
    assert not process.exists()


def test_a_batch_gives_each_its_own(tiny: PreTrainedTokenizerFast) -> None:
    tiny.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if messages[0].content == 'bomb' %}{{ 'a' * 10 ** 9 }}{% endif %}"
    )
    questions = ["the old", "no", "a</s>", "red ball", "no", "tower"]
    batch = [
        Conversation((Message("user", question), TURNS[1]), "q", number) for number, question in enumerate(questions)
    ]
    with open_template("model", tokenizer=tiny) as template:
        found = list(render_all(batch, template, max_len=99))
        for conversation, row in zip(batch, found, strict=True):
            if isinstance(row, BadDocument):
                assert row.where == conversation.where
                continue
            alone = render(conversation, template, max_len=99)
            assert np.array_equal(row.input_ids_T, alone.input_ids_T)
            assert row.line == conversation.line
        assert [isinstance(row, BadDocument) and row.reason for row in found] == [
            False,
            "refused by the template",
            "control token in the text",
            False,
            "refused by the template",
            False,
        ]
        bomb = Conversation((Message("user", "bomb"), TURNS[1]), "bomb", 1)
        with pytest.raises(InputError, match=r"hint: at bomb:1"):
            list(render_all([*batch, bomb, *batch], template, max_len=99))
