"""What a model writes: against a loop of our own over the stock class, and files of prompts that survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from prismoe.cli import main
from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.generate import generate
from prismoe.generate.answers import answer_file
from prismoe.generate.prompts import Prompt, read_prompts
from prismoe.generate.sampling import Sampling
from prismoe.generate.speaker import Speaker
from prismoe.tune.conversations import Message
from tests.speakers import TEMPLATE, changed, models, vicuna

PROMPTS = ("Once upon a time", "def add", "The king said: no one may enter the old tower")


def written(
    folder: Path, text: str, length: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> str:
    """By one full forward pass for each token, in float64, and top-p by its definition."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(text).ids
    begin = len(ids)
    while len(ids) < begin + length and (len(ids) == begin or ids[-1] != 2):
        logits_V = model(torch.tensor([ids])).logits[0, -1].detach()
        if not temperature:
            ids.append(int(logits_V.argmax()))
            continue
        share_V = (logits_V / temperature).softmax(-1)
        order = share_V.argsort(descending=True)
        before = share_V[order].cumsum(0) - share_V[order]
        share_V[order[before >= top_p]] = 0
        ids.append(int(torch.multinomial((share_V / share_V.sum()).float(), 1, generator=draw)))
    return tokenizer.decode(ids[begin:])


def test_greedy_and_drawn_text_are_what_the_stock_class_says_token_by_token() -> None:
    moe = models()[1]
    found = generate(moe, PROMPTS, max_new_tokens=12)
    assert [sample.text for sample in found] == [written(moe, prompt, 12) for prompt in PROMPTS]
    drawn = generate(moe, PROMPTS[:2], max_new_tokens=12, temperature=1.3, top_p=0.8, seed=5)
    settings = {"temperature": 1.3, "top_p": 0.8, "seed": 5}
    assert [sample.text for sample in drawn] == [written(moe, prompt, 12, **settings) for prompt in PROMPTS[:2]]
    assert drawn[0].text != found[0].text


def test_a_batch_says_what_each_row_says_alone() -> None:
    cold, warm = Sampling(max_new_tokens=10), Sampling(1.0, 0.9, max_new_tokens=7, seed=3)
    with Speaker(models()[1], template=None, device="cpu") as speaker:
        rows = [(speaker.text_ids(text), sampling) for text in PROMPTS for sampling in (cold, warm)]
        together = speaker.speak(rows)
        assert together == [speaker.speak([row])[0] for row in rows]
        wanted = zip(together, [10, 7] * 3, strict=True)
        assert all(len(speech.ids) == most or (speech.ended and len(speech.ids) < most) for speech, most in wanted)
        assert not all(speech.ended for speech in together)


def test_the_end_is_where_any_named_token_says_and_other_settings_of_the_folder_are_not_followed(
    tmp_path: Path,
) -> None:
    moe = models()[1]
    with Speaker(moe, template=None, device="cpu") as speaker:
        ids = speaker.speak([(speaker.text_ids(PROMPTS[0]), Sampling(max_new_tokens=12))])[0].ids
    end = next(number for place, number in enumerate(ids) if place > 1 and number not in ids[:place])
    other = changed(
        tmp_path / "m",
        "generation_config.json",
        **{"eos_token_id": [2, end], "do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0},
    )
    with Speaker(other, template=None, device="cpu") as speaker:
        (speech,) = speaker.speak([(speaker.text_ids(PROMPTS[0]), Sampling(max_new_tokens=12))])
        assert end in speaker.ends
    assert speech.ended
    assert speech.ids == ids[: ids.index(end)]


def test_room_is_what_the_context_leaves(tmp_path: Path) -> None:
    small = changed(tmp_path / "m", max_position_embeddings=8)
    with Speaker(small, template=None, device="cpu") as speaker:
        ids = speaker.text_ids(PROMPTS[1])
        short, long = speaker.speak([(ids, Sampling(max_new_tokens=50)), ((ids * 9)[:7], Sampling(max_new_tokens=50))])
        assert (len(short.ids), len(long.ids)) == (8 - len(ids), 1)
        with pytest.raises(UsageError, match=r"a prompt of 8 ids; needed fewer than the model's 8"):
            speaker.speak([((ids * 9)[:8], Sampling())])


def test_prompts_of_every_form(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Once"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows[:2]) + "\n\n" + json.dumps(rows[2]))
    system, question = Message("system", "S"), Message("user", "Q")
    where = [f"{path}:{number}" for number in (1, 2, 4)]
    assert read_prompts(path, chat=False) == [
        Prompt("Once", (), where[0], 1),
        Prompt(None, (system, question), where[1], 2),
        Prompt(None, (question,), where[2], 4),
    ]
    assert read_prompts(path, chat=True)[0] == Prompt(None, (Message("user", "Once"),), where[0], 1)
    text = tmp_path / "p.txt"
    text.write_text("\ufeffone\r\n\ntwo words\n")
    assert [(one.text, one.line) for one in read_prompts(text, chat=False)] == [("one", 1), ("two words", 3)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": 1', r"a\.jsonl:1: .*JSON"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "A"}]}', r"a\.jsonl:1: no question to answer"),
        ("a.jsonl", '{"prompt": "\\ud800"}', r"a\.jsonl:1: half of a surrogate pair"),
        ("a.jsonl", '{"other": "x"}', r"a\.jsonl:1: a row of no known form"),
        ("a.txt", "\n \n", r"a\.txt: no prompts in it"),
        ("a.csv", "x", r"a\.csv: not a kind of file that is read"),
    ],
)
def test_a_bad_file_of_prompts_is_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises((BadDocument, InputError), match=message) as error:
        read_prompts(path, chat=False)
    assert "\n" not in str(error.value)


class Killed(Exception):
    pass


def test_a_killed_job_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    sampling = Sampling(0.8, max_new_tokens=6, seed=1)
    prompts = [Prompt.plain(f"{PROMPTS[0]} {number}", chat=False, line=number + 1) for number in range(7)]

    def kill(what: str, done: int, total: int) -> None:
        if done == 4:
            raise Killed

    with Speaker(models()[1], template=None, device="cpu") as speaker:
        whole = answer_file(speaker, prompts, out=tmp_path / "whole.jsonl", sampling=sampling, batch_size=2)
        out, partial = tmp_path / "a.jsonl", tmp_path / "a.jsonl.partial"
        with pytest.raises(Killed):
            answer_file(speaker, prompts, out=out, sampling=sampling, batch_size=2, on_progress=kill)
        assert not out.exists()
        lines = partial.read_bytes()
        assert lines.count(b"\n") == 5
        partial.write_bytes(lines[:-9])  # the last line was being written
        other = Sampling(0.8, max_new_tokens=6, seed=2)
        with pytest.raises(ResourceError, match="holds a different job"):
            answer_file(speaker, prompts, out=out, sampling=other, batch_size=2)
        again = answer_file(speaker, prompts, out=out, sampling=sampling, batch_size=2)
        with pytest.raises(ResourceError, match="is there already"):
            answer_file(speaker, prompts, out=out, sampling=sampling)
    assert (again.rows, again.resumed, whole.resumed) == (7, 2, 0)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists()
    row = json.loads(out.read_text().splitlines()[3])
    (alone,) = generate(models()[1], [prompts[3].text or ""], max_new_tokens=6, temperature=0.8, seed=1)
    assert (row["line"], row["prompt"], row["text"]) == (4, prompts[3].text, alone.text)
    assert (row["finish"], row["tokens"]) in {("length", 6), *(("end", count) for count in range(7))}


def test_the_verb_answers_conversations_with_the_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    path.write_text('{"prompt": "Once upon"}\n{"messages": [{"role": "user", "content": "Once upon"}]}\n')
    moe = str(models()[1])
    arguments = ["generate", moe, str(path), "--out", str(out), f"template={TEMPLATE}", "max_new_tokens=6"]
    assert main([*arguments, "device=cpu"]) == 0
    assert f"{out}: 2 answers, " in capsys.readouterr().out
    (expected,) = generate(moe, [vicuna(["Once upon"])], max_new_tokens=6)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == [expected.text] * 2
    assert main(["generate", moe, "prompt=Once: upon=a", "max_new_tokens=6"]) == 0
    assert capsys.readouterr().out.strip() == generate(moe, ["Once: upon=a"], max_new_tokens=6)[0].text.strip()
    assert main(["generate", moe, str(path)]) == 2
    assert capsys.readouterr().err == "prismoe: generate: out is not set; needed --out FILE.jsonl\n"
    assert main(["generate", moe]) == 2
    assert "0 files, 0 prompts; needed FILE or prompt=TEXT" in capsys.readouterr().err
