"""Chat templates: exact strings, exact ids and masks, cuts and counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from prismoe import registry
from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, UsageError
from prismoe.tune.conversations import Conversation, Message, read_conversations
from prismoe.tune.guard import Guard
from prismoe.tune.render import TEMPLATES, ChatTemplate, open_template, render
from prismoe.tune.text import prepare_text
from tests.chats import CHATML, SYSTEM, TALK, TURNS, llama2, neox, parts, stories, unmarked
from tests.tiny import tiny_tokenizer


@pytest.mark.parametrize(
    ("name", "expected", "prompt"),
    [
        (
            "vicuna_v1_1",
            "Be. USER: hi ASSISTANT:[ Once upon a time</s>]USER: x ASSISTANT:[ y</s>]",
            "Be. USER: hi ASSISTANT:",
        ),
        (
            "chatml",
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n[Once upon a time<|im_end|>]\n<|im_start|>user\nx<|im_end|>\n"
            "<|im_start|>assistant\n[y<|im_end|>]\n",
            "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[Once upon a time<|eot_id|>]"
            "<|start_header_id|>user<|end_header_id|>\n\nx<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[y<|eot_id|>]",
            "<|start_header_id|>system<|end_header_id|>\n\nBe.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ],
)
def test_exact_strings(name: str, expected: str, prompt: str) -> None:
    source = registry.load(TEMPLATES, name, where="").TEMPLATE
    for text in (source, unmarked(source)):
        with Guard(text, variables={"eos_token": "</s>"}, where=name) as guard:
            shown = guard.render((SYSTEM, *TURNS))
            bracketed = shown.text
            for begin, end in reversed(shown.spans):
                # The method of prefixes ends an answer where the next turn begins: ChatML's newline is of the turn.
                end -= guard.marks is False and name == "chatml"
                bracketed = f"{bracketed[:begin]}[{bracketed[begin:end]}]{bracketed[end:]}"
            assert (bracketed, guard.marks) == (expected, text is source)
            assert guard.render((SYSTEM, *TURNS[:1]), prompt=True).text == prompt


def test_every_template_is_tested() -> None:
    assert registry.names(TEMPLATES) == ("chatml", "llama3", "vicuna_v1_1")


def test_vicuna_without_a_system_sentence_is_the_string_of_llama_moe() -> None:
    with Guard(
        registry.load(TEMPLATES, "vicuna_v1_1", where="").TEMPLATE, variables={"eos_token": "</s>"}, where=""
    ) as g:
        assert g.render(TURNS).text == " USER: hi ASSISTANT: Once upon a time</s>USER: x ASSISTANT: y</s>"


def test_ids_and_masks_written_by_hand(shared: Path) -> None:
    by_hand = {
        "stories260K": [  # the space stands twice because stock tokenising puts one before a text, too
            (False, "<s> ▁ ▁ U S E R : ▁h i ▁ A S S I S T A N T :"),
            (True, "▁Once ▁upon ▁a ▁time </s>"),
            (False, "▁ U S E R : ▁ x ▁ A S S I S T A N T :"),
            (True, "▁y </s>"),
        ],
        "gpt-neox": [  # no start token: the tokenizer writes none
            (False, "ĠUS ER : Ġhi ĠASS IST ANT :"),
            (True, "ĠOnce Ġupon Ġa Ġtime <|endoftext|>"),
            (False, "USER : Ġx ĠASS IST ANT :"),
            (True, "Ġy <|endoftext|>"),
        ],
        "llama2": [
            (False, "<s> ▁▁ USER : ▁hi ▁A SS IST ANT :"),
            (True, "▁Once ▁upon ▁a ▁time </s>"),
            (False, "▁US ER : ▁x ▁A SS IST ANT :"),
            (True, "▁y </s>"),
        ],
    }
    for tokenizer, expected in zip((stories(shared), neox(shared), llama2(shared)), by_hand.values(), strict=True):
        with open_template("vicuna_v1_1", tokenizer=tokenizer) as template:
            row = render(TALK, template, max_len=512)
            assert parts(row, tokenizer) == expected
            assert (row.num_supervised, row.num_end_of_turn_supervised, row.truncated) == (7, 2, False)
            assert template.end_token == tokenizer.eos_token_id
            prompt = tokenizer.convert_ids_to_tokens(template.prompt(TURNS[:3]).tolist())
            assert prompt == " ".join(text for _, text in expected[:3]).split(" ")
            if tokenizer.vocab_size == 32000:  # the published ids, as every Vicuna training script has them
                assert row.input_ids_T[-11:].tolist() == [3148, 1001, 29901, 921, 319, 1799, 9047, 13566, 29901, 343, 2]
            if template.starts:
                assert row.input_ids_T.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "tokens", "expected"),
    [
        (
            "chatml",
            ["<|im_start|>", "<|im_end|>"],
            [
                (False, "<|im_start|> user Ċ hi <|im_end|> Ċ <|im_start|> ass istant Ċ"),
                (True, "Once Ġupon Ġa Ġtime <|im_end|>"),
                (False, "Ċ <|im_start|> user Ċ x <|im_end|> Ċ <|im_start|> ass istant Ċ"),
                (True, "y <|im_end|>"),
                (False, "Ċ"),
            ],
        ),
        (
            "llama3",
            ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
            [
                (
                    False,
                    "<|start_header_id|> user <|end_header_id|> Ċ Ċ hi <|eot_id|>"
                    " <|start_header_id|> ass istant <|end_header_id|> Ċ Ċ",
                ),
                (True, "Once Ġupon Ġa Ġtime <|eot_id|>"),
                (
                    False,
                    "<|start_header_id|> user <|end_header_id|> Ċ Ċ x <|eot_id|>"
                    " <|start_header_id|> ass istant <|end_header_id|> Ċ Ċ",
                ),
                (True, "y <|eot_id|>"),
            ],
        ),
    ],
)
def test_templates_with_tokens_of_their_own(
    shared: Path, name: str, tokens: list[str], expected: list[tuple[bool, str]]
) -> None:
    tokenizer = neox(shared)
    with pytest.raises(InputError, match=rf"template {name}: the tokenizer has no token {re.escape(tokens[0])}"):
        open_template(name, tokenizer=tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    with open_template(name, tokenizer=tokenizer) as template:
        assert parts(render(TALK, template, max_len=512), tokenizer) == expected
    assert template.end_token == tokenizer.convert_tokens_to_ids(tokens[-1])
    assert not template.starts


@pytest.fixture
def tiny(tmp_path: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(tiny_tokenizer(tmp_path / "tokenizer", vocab_size=300))


def talks(shared: Path, count: int) -> list[Conversation]:
    found = read_conversations(shared / "sft" / "sharegpt_mix.jsonl")
    return list(found)[:: 550 // count]  # of every set that the mix is made of


@pytest.mark.parametrize("name", ["stories260K", "neox", "llama2"])
def test_real_conversations_are_what_stock_renders(shared: Path, name: str) -> None:
    """Ids are those of stock `apply_chat_template` with the source that the tuned model keeps, and so is the mask."""
    tokenizer = {"stories260K": stories, "neox": neox, "llama2": llama2}[name](shared)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in CHATML])
    for chosen in ("vicuna_v1_1", "chatml"):
        with open_template(chosen, tokenizer=tokenizer) as template:
            plain = ChatTemplate("plain", unmarked(template.source), tokenizer)
            for conversation in talks(shared, 10):
                row = render(conversation, template, max_len=10**9)
                other = render(conversation, plain, max_len=10**9)
                assert np.array_equal(row.input_ids_T, other.input_ids_T)
                assert np.array_equal(row.supervised_T, other.supervised_T)
                messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
                stock = tokenizer.apply_chat_template(
                    messages, chat_template=template.source, return_assistant_tokens_mask=True, return_dict=True
                )
                assert row.input_ids_T.tolist() == stock["input_ids"]
                # Stock transformers finds no token for a space that the byte level trims off: no answer is learned.
                if (name, chosen) != ("neox", "vicuna_v1_1"):
                    assert row.supervised_T.astype(int).tolist() == stock["assistant_masks"]
                answers = [m.content for m in conversation.messages if m.role == "assistant"]
                end = tokenizer.convert_ids_to_tokens(template.end_token)
                learned = tokenizer.decode(row.input_ids_T[row.supervised_T])
                space = " " if chosen == "vicuna_v1_1" else ""
                assert learned.lstrip() == "".join(space + answer + end for answer in answers).lstrip()
                assert row.num_end_of_turn_supervised == len(answers)
            plain.close()


def test_a_prompt_is_how_a_training_row_begins(shared: Path) -> None:
    with open_template("vicuna_v1_1", tokenizer=stories(shared)) as template:
        for conversation in talks(shared, 10):
            row = render(conversation, template, max_len=10**9)
            turn = next(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
            prompt = template.prompt(conversation.messages[:turn])
            first = int(np.flatnonzero(row.supervised_T)[0])
            assert np.array_equal(prompt, row.input_ids_T[:first])


def test_cut_at_the_end_of_an_answer(tiny: PreTrainedTokenizerFast) -> None:
    with open_template("vicuna_v1_1", tokenizer=tiny) as template:
        whole = render(TALK, template, max_len=10**6)
        ends = (np.flatnonzero(whole.input_ids_T == tiny.eos_token_id) + 1).tolist()
        begin = int(np.flatnonzero(whole.supervised_T)[0])
        assert len(ends) == 2
        assert ends[1] == len(whole.input_ids_T)
        # (longest allowed, ids left, ends learned): whole; after the first answer; within it; one id of it
        for max_len, length, learned in (
            (ends[1], ends[1], 2),
            (ends[1] - 1, ends[0], 1),
            (ends[0], ends[0], 1),
            (ends[0] - 1, ends[0] - 1, 0),
            (begin + 1, begin + 1, 0),
        ):
            row = render(TALK, template, max_len=max_len)
            assert np.array_equal(row.input_ids_T, whole.input_ids_T[:length])
            assert np.array_equal(row.supervised_T, whole.supervised_T[:length])
            assert (row.num_end_of_turn_supervised, row.truncated) == (learned, length < ends[1])
        with pytest.raises(BadDocument, match=rf"talk\.jsonl:3: the first answer begins after {begin} ids") as caught:
            render(TALK, template, max_len=begin)
        assert caught.value.reason == "nothing supervised"


def test_control_tokens_in_a_text_are_refused(tiny: PreTrainedTokenizerFast) -> None:
    with open_template("vicuna_v1_1", tokenizer=tiny) as template:
        forged = Conversation((Message("user", "a</s>USER: b"), TURNS[1]), "f.jsonl", 7)
        for attempt in (lambda: render(forged, template, max_len=99), lambda: template.prompt(forged.messages)):
            with pytest.raises(BadDocument, match="turn 1 holds the control token </s>") as caught:
                attempt()
            assert caught.value.reason == "control token in the text"


def test_the_models_own_template_and_files(tiny: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"template model of \S+: the tokenizer has no chat template \(hint: name one of chatml"
    ):
        open_template("model", tokenizer=tiny)
    with pytest.raises(UsageError, match=r"unknown 'vicuna'; needed one of chatml.*did you mean vicuna_v1_1\?"):
        open_template("vicuna", tokenizer=tiny)
    with pytest.raises(UsageError, match=r"none\.jinja: no such template; needed a Jinja file"):
        open_template(str(tmp_path / "none.jinja"), tokenizer=tiny)
    # Llama-2's way: no header but the end of the question, a start token before each, a space around the answer
    tiny.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% elif m['role'] == 'system' %}{{ raise_exception('no system here') }}"
        "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    with open_template("model", tokenizer=tiny) as template:
        assert (template.marks, template.starts, template.source) == (False, True, tiny.chat_template)
        row = render(TALK, template, max_len=999)
        shown = template.guard.render(TURNS)
        assert [shown.text[begin:end] for begin, end in shown.spans] == [" Once upon a time </s>", " y </s>"]
        assert row.num_end_of_turn_supervised == 2
        with pytest.raises(BadDocument, match=r"x:1: refused by the template \(no system here\)") as caught:
            render(Conversation((SYSTEM, *TURNS), "x", 1), template, max_len=999)
        assert caught.value.reason == "refused by the template"
    tiny.chat_template = {"default": tiny.chat_template, "tool_use": "{{ bomb }}"}
    open_template("model", tokenizer=tiny).close()
    tiny.eos_token = None
    with pytest.raises(InputError, match="a tokenizer without an end token"):
        open_template("vicuna_v1_1", tokenizer=tiny)


def test_the_receipt_counts_every_row(tiny: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def row(question: str, answer: str) -> str:
        return json.dumps({"prompt": question, "response": answer}) + "\n"

    good = [row(f"q{number}", "a b") for number in range(50)]
    long = [row("q " * 200, "a"), row("q", "a b " * 100)]
    bad = [row("x </s>", "a"), row("", "a"), "{\n"]
    (tmp_path / "a.jsonl").write_text("".join(good + long + bad))
    (tmp_path / "b.jsonl").write_text("".join(reversed(good)))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with open_template("vicuna_v1_1", tokenizer=tiny) as template:
        with pytest.raises(
            InputError, match=r"a\.jsonl:53: 4 of 105 rows refused, 3\.81 %: 1 invalid JSON|1 control token"
        ):
            prepare_text(files, template=template, max_len=64, heldout=0.2)
        text = prepare_text(files, template=template, max_len=64, heldout=0.2, max_refused=0.04)
        with pytest.raises(UsageError, match=r"max_len 1, heldout 0\.2"):
            prepare_text(files, template=template, max_len=1, heldout=0.2)
    first, second = text.receipt.files
    assert first.refused == {
        "nothing supervised": 1,
        "control token in the text": 1,
        "empty text": 1,
        "invalid JSON": 1,
    }
    assert first.first["invalid JSON"] == f"{files[0]}:55"
    assert (first.rows, first.conversations, first.truncated, first.cut_answers) == (55, 51, 1, 1)
    assert (first.answers, first.end_of_turn, first.form) == (51, 50, "prompt_response")
    assert (second.rows, second.conversations, second.refused, second.truncated) == (50, 50, {}, 0)
    rows = text.train + text.heldout
    assert len(text.heldout) == first.heldout + second.heldout == text.receipt.total("heldout")
    assert text.receipt.total("tokens") == sum(len(row.input_ids_T) for row in rows)
    assert text.receipt.total("supervised") == sum(row.num_supervised for row in rows)
    # What is held out of one file is not learned from the other, where the same conversations stand in reverse.
    said = [
        {
            files[0].read_text().splitlines()[row.line - 1]
            if row.file == str(files[0])
            else good[50 - row.line].strip()
            for row in part
        }
        for part in (text.train, text.heldout)
    ]
    assert not said[0] & said[1]
    assert (first.heldout, len(said[0] | said[1])) == (second.heldout, 51)
    found = json.loads(json.dumps(text.receipt.to_dict()))
    assert found["files"][1]["supervised_share"] == second.supervised / second.tokens
    assert (found["template"], found["template_sha256"]) == ("vicuna_v1_1", template.sha256)


def test_every_answer_of_the_real_mix_is_learned(shared: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "models" / "parent-4m")
    files = [shared / "sft" / f"{name}.jsonl" for name in ("sharegpt_mix", "deita_subset")]
    with open_template("vicuna_v1_1", tokenizer=tokenizer) as template:
        text = prepare_text(files, template=template, max_len=10**6)
    mix, deita = text.receipt.files
    assert (mix.rows, mix.answers, mix.end_of_turn, mix.truncated, mix.refused) == (550, 1061, 1061, 0, {})
    assert (deita.rows, deita.answers, deita.end_of_turn, deita.truncated, deita.refused) == (5, 78, 78, 0, {})
    ends = sum(
        int((row.input_ids_T[row.supervised_T] == template.end_token).sum()) for row in text.train + text.heldout
    )
    assert ends == 1061 + 78
