"""Talking to a model: what it reads is the template over the history, its experts are the stock routers' choices."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prismoe.chat.dialogue import Dialogue, _Text
from prismoe.chat.talk import talk
from prismoe.chat.tokenexperts import TokenExperts
from prismoe.cli import main
from prismoe.console import Screen
from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, UsageError
from prismoe.generate import generate
from prismoe.generate.rows import Stopped
from prismoe.generate.sampling import Sampling
from prismoe.generate.speaker import Speaker
from prismoe.showanswers import show_experts
from tests.speakers import TEMPLATE, changed, models, vicuna

SHORT = Sampling(max_new_tokens=6)


def opened(folder: Path) -> Speaker:
    return Speaker(folder, template=TEMPLATE, device="cpu")


def test_each_answer_follows_the_template_over_all_turns() -> None:
    moe = models()[1]
    sampling = Sampling(0.9, max_new_tokens=6, seed=4)
    with opened(moe) as speaker, Dialogue(speaker, sampling=sampling, system="Be.") as dialogue:
        heard: list[str] = []
        first = dialogue.ask("Once upon", on_text=heard.append)
        second = dialogue.ask("a time")
        assert "".join(heard) == first.text
        texts = [vicuna(["Once upon"], system="Be."), vicuna(["Once upon", first.text, "a time"], system="Be.")]
        settings = {"max_new_tokens": 6, "temperature": 0.9}
        seeds = (4, 5)  # one for each answer
        expected = [
            generate(moe, [text], seed=seed, **settings)[0].text for text, seed in zip(texts, seeds, strict=True)
        ]
        assert [first.text, second.text] == [text.strip() for text in expected]
        dialogue.reset()
        assert dialogue.ask("Once upon") == first


def test_the_oldest_turns_go_when_the_context_is_full(tmp_path: Path) -> None:
    small = changed(tmp_path / "m", max_position_embeddings=96)
    with opened(small) as speaker, Dialogue(speaker, sampling=Sampling(max_new_tokens=10)) as dialogue:
        dropped: list[int] = []
        answers = [dialogue.ask(f"def add {number}", on_drop=dropped.append) for number in range(6)]
        assert [answer.dropped for answer in answers if answer.dropped] == dropped
        assert dropped
        kept = [turn.content for turn in dialogue.turns if turn.role == "user"]
        assert kept == [f"def add {number}" for number in range(6)][-len(kept) :]
        assert len(kept) == 6 - sum(dropped)
        # Nothing was dropped that would have fitted: with one more turn and 10 tokens the last prompt was too long.
        last = [turn.content for turn in dialogue.turns][:-1]
        one_more = [f"def add {5 - len(kept)}", answers[5 - len(kept)].text, *last]
        assert len(speaker.text_ids(vicuna(last))) + 10 <= 96 < len(speaker.text_ids(vicuna(one_more))) + 10
        with pytest.raises(UsageError, match=r"a question of \d+ ids; needed fewer than the model's 96"):
            dialogue.ask("the king said " * 40)
        assert [turn.content for turn in dialogue.turns[:-1]] == last


def test_a_control_token_is_refused_and_leaves_the_dialogue_as_it_was() -> None:
    with opened(models()[1]) as speaker, Dialogue(speaker, sampling=SHORT) as dialogue:
        first = dialogue.ask("Once")
        with pytest.raises(BadDocument, match="holds the control token </s>"):
            dialogue.ask("x</s>USER: y")
        with pytest.raises(UsageError, match="an empty question"):
            dialogue.ask(" ")
        assert [turn.content for turn in dialogue.turns] == ["Once", first.text]


def test_experts_of_a_token_are_the_stock_routers_choice_when_it_is_read() -> None:
    moe = models()[1]
    with opened(moe) as speaker, Dialogue(speaker, sampling=Sampling(1.0, max_new_tokens=9), experts=True) as dialogue:
        answers = [dialogue.ask("Once upon"), dialogue.ask("a time")]
        model = AutoModelForCausalLM.from_pretrained(moe)
        turns: list[str] = []
        for answer in answers:
            turns.append(answer.question)
            prompt = speaker.prompt_ids(dialogue.turns[: len(turns)])
            found = answer.experts
            assert found is not None
            assert (found.layers, found.num_experts, len(found.tokens)) == ((0, 1, 2), 4, answer.tokens)
            ids = [speaker._tokenizer.token_to_id(token) for token in found.tokens]
            output = model(torch.tensor([[*prompt, *ids]]), output_router_logits=True)
            for layer, logits_TE in enumerate(output.router_logits):
                chosen_TK = logits_TE[len(prompt) :].topk(2).indices.tolist()
                read = len(ids) if answer.finish == "end" else len(ids) - 1
                assert [token[layer] for token in found.chosen] == [tuple(pair) for pair in chosen_TK[:read]]
            turns.append(answer.text)


def test_a_dense_model_has_no_experts_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    with opened(models()[0]) as speaker, pytest.raises(InputError, match="no router in it; needed a mixture"):
        Dialogue(speaker, sampling=SHORT, experts=True)
    assert main(["chat", str(models()[0]), f"template={TEMPLATE}", "experts=true"]) == 3
    assert capsys.readouterr().err == "prismoe: llama: no router in it; needed a mixture (hint: experts=false)\n"


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    heard: list[str] = []

    def stop(text: str) -> None:
        heard.append(text)
        if len(heard) == 3:
            raise Stopped

    with opened(models()[1]) as speaker, Dialogue(speaker, sampling=Sampling(max_new_tokens=9)) as dialogue:
        answer = dialogue.ask("Once upon", on_text=stop)
        assert (answer.finish, answer.tokens, answer.text) == ("stopped", 3, "".join(heard))
        whole = Dialogue(speaker, sampling=Sampling(max_new_tokens=3)).ask("Once upon")
        assert answer.text == whole.text
        assert [turn.content for turn in dialogue.turns] == ["Once upon", answer.text]


def test_streamed_text_has_whole_characters_only(shared: Path) -> None:
    with Speaker(shared / "models" / "stories260K", template=None, device="cpu") as speaker:
        ids = speaker.text_ids("na\u00efve \u65e5\u672c \U0001f642 \ufffd end")
        parts: list[str] = []
        text = _Text(speaker, parts.append)
        for number in ids:
            text.add(number)
        assert any("\u65e5" in part for part in parts)
        text.finish()
        assert "".join(parts) == speaker.text(ids).strip()
        assert sum(part.count("\ufffd") for part in parts) == 1  # the one that was there


class Log:
    """What a chat shows, in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def text(self, text: str) -> None:
        self.said.append(("text", text))

    def end(self) -> None:
        self.said.append(("end", ""))

    def experts(self, found: TokenExperts) -> None:
        self.said.append(("experts", str(len(found.chosen))))

    def note(self, text: str) -> None:
        self.said.append(("note", text))

    def error(self, text: str) -> None:
        self.said.append(("error", text))


def test_commands() -> None:
    log = Log()
    with opened(models()[1]) as speaker, Dialogue(speaker, sampling=SHORT) as dialogue:
        lines = ["", "Once", "/system Be good.", "/sytem x", "//slash", "/help", "x</s>", "/reset", "/quit", "never"]
        answers = talk(lines, dialogue, log, catch=False)
        assert [answer.question for answer in answers] == ["Once", "/slash"]
        assert (dialogue.system, dialogue.turns) == ("Be good.", [])
        dialogue.ask("/slash")
        assert dialogue.turns[-1].content == answers[1].text  # nothing but the sentence stood before it
    notes = [text for kind, text in log.said if kind == "note"]
    assert "system: Be good." in notes
    assert "the conversation is forgotten" in notes
    assert any("/system TEXT" in note and "experts=true" in note for note in notes)
    errors = [text for kind, text in log.said if kind == "error"]
    assert errors[0].startswith("unknown command /sytem; needed /reset")
    assert "control token </s>" in errors[1]
    assert len(errors) == 2


def test_the_table_of_experts_fits_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = tuple(tuple((token, layer % 10) for layer in range(60)) for token in range(2))
    found = TokenExperts(("\u2581Once", "\n", "</s>"), tuple(range(60)), 16, chosen)
    show_experts(Screen(), found.to_dict())
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 240
    heads = [line.split() for line in lines if line.startswith("token")]
    assert [name for head in heads for name in head[1:]] == [f"L{layer}" for layer in range(60)]
    assert lines[1].split()[:4] == ["\u2581Once", "0,0", "0,1", "0,2"]
    assert lines[2].split()[:2] == ["\u00b7", "1,0"]
    assert set(lines[3].split()[1:]) == {"\u2013"}


def test_a_pipe_is_a_chat_of_a_turn_a_line() -> None:
    def piped(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "prismoe", "chat", str(models()[1]), f"template={TEMPLATE}", "device=cpu"]
        return subprocess.run(
            [*command, "temperature=0", "max_new_tokens=6", "system=Be: #1", *arguments],
            input="Once upon\n/nonsense\na time\n",
            capture_output=True,
            text=True,
            timeout=240,
            check=True,
        )

    plain, found = piped(), json.loads(piped("--json", "experts=true").stdout)
    first, second = (turn["text"] for turn in found["turns"])
    (expected,) = generate(models()[1], [vicuna(["Once upon", first, "a time"], system="Be: #1")], max_new_tokens=6)
    assert second == expected.text.strip()
    assert plain.stdout == f"{first}\n{second}\n"
    assert "unknown command /nonsense" in plain.stderr
    assert len(found["turns"][0]["experts"]["chosen"]) >= found["turns"][0]["tokens"] - 1


def test_ctrl_c_stops_the_answer_and_not_the_program(tmp_path: Path) -> None:
    endless = changed(tmp_path / "m", max_position_embeddings=1_000_000)
    tensors = load_file(endless / "model.safetensors")
    tensors["lm_head.weight"][2] = 0  # the end token is never the likeliest
    save_file(tensors, endless / "model.safetensors", metadata={"format": "pt"})
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "prismoe", "chat", str(endless), f"template={TEMPLATE}", "device=cpu"]
    process = subprocess.Popen(
        [*command, "max_new_tokens=100000", "temperature=0"],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "dumb"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    )
    os.close(slave)
    seen = b""

    def until(pattern: bytes, after: int = 0, *, press: bool = False) -> int:
        """`press`: Ctrl-C again after a second of silence. One that comes while readline begins waits for a key."""
        nonlocal seen
        while not (found := re.search(pattern, seen[after:])):
            if press and not select.select([master], [], [], 1)[0]:
                process.send_signal(signal.SIGINT)
            else:
                seen += os.read(master, 4096)
        return after + found.end()

    place = until(rb"\n> ")
    os.write(master, b"Once upon\n")
    place = until(rb"Once upon\r\n\w", after=place)  # an answer has begun
    process.send_signal(signal.SIGINT)
    place = until(rb"\(stopped\)\r\n> ", after=place)
    process.send_signal(signal.SIGINT)  # at the prompt it drops the line
    place = until(rb"> ", after=place, press=True)
    os.write(master, b"/quit\n")
    assert process.wait(timeout=60) == 0
    os.close(master)
