"""MT-Bench: FastChat's files in and out, answers by category, and a judge that speaks the real protocol."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from prismoe.cli import main
from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.generate import generate
from prismoe.generate.speaker import Speaker
from prismoe.mtbench.answering import Answers, answer_questions
from prismoe.mtbench.endpoint import Endpoint, Failed
from prismoe.mtbench.judging import Judged, judge_answers
from prismoe.mtbench.questions import NEED_REFERENCE, read_answers, read_judge_prompts, read_questions
from prismoe.mtbench.requests import make_requests
from prismoe.mtbench.scores import rating
from tests.judges import (
    QUESTIONS,
    Reply,
    completion,
    judge,
    judged,
    lines,
    prompt_file,
    question_file,
    reference_file,
    refusal,
    score_of,
)
from tests.speakers import TEMPLATE, changed, models, vicuna

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the machine has nothing to do with 127.0.0.1."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def answered(folder: Path, name: str = "out", **options: Any) -> Answers:
    with Speaker(models()[1], template=TEMPLATE, device="cpu") as speaker:
        return answer_questions(
            speaker, question_file(folder), out=folder / name, model_id="tiny", max_new_tokens=6, **options
        )


def grade(folder: Path, **options: Any) -> Judged:
    """Have the answers in folder/out judged."""
    given: dict[str, Any] = {"prompts": prompt_file(folder), "references": reference_file(folder), "judge_model": "j/1"}
    return judge_answers(folder / "out", **{**given, **options})


def turns_of(path: Path) -> list[list[str]]:
    return [json.loads(line)["choices"][0]["turns"] for line in path.read_text().splitlines()]


def test_answers_are_those_of_the_template_at_each_category_temperature(tmp_path: Path) -> None:
    found = answered(tmp_path, seed=3, batch_size=2)
    rows = [json.loads(line) for line in Path(found.answers).read_text().splitlines()]
    assert (found.questions, found.resumed, found.turns, found.no_room) == (3, 0, 6, 0)
    assert Path(found.answers) == tmp_path / "out" / "model_answer" / "tiny.jsonl"
    for row, (number, category, asked) in zip(rows, QUESTIONS, strict=True):
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert (row["question_id"], row["model_id"], len(row["answer_id"])) == (number, "tiny", 22)
        (choice,) = row["choices"]
        assert choice["index"] == 0
        said: list[str] = []
        for turn, question in enumerate(asked):
            text = vicuna([text for pair in zip(asked, said, strict=False) for text in pair] + [question])
            settings = {"temperature": {"writing": 0.7, "math": 0.0}[category], "seed": 3 + turn}
            (expected,) = generate(models()[1], [text], max_new_tokens=6, **settings)  # type: ignore[arg-type]
            said.append(expected.text.strip())
        assert choice["turns"] == said


def test_temperatures_are_the_benchmarks(shared: Path) -> None:
    questions = read_questions(shared / "eval" / "mt_bench_question.jsonl")
    assert len(questions) == 80
    found = {question.category: question.temperature for question in questions}
    assert found == {
        **{"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1},
        **{"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0},
    }


def test_requests_on_the_real_files_are_what_str_format_gives(shared: Path) -> None:
    folder = shared / "eval"
    questions = read_questions(folder / "mt_bench_question.jsonl")
    references = read_answers(folder / "mt_bench_reference_gpt4.jsonl")
    prompts = read_judge_prompts(folder / "mt_bench_judge_prompts.jsonl")
    answers = {question.question_id: (f"first {{x}} {question.question_id}", "second") for question in questions}
    found = make_requests(questions, answers, prompts, references)
    assert len(found) == 160
    assert len({one.custom_id for one in found}) == 160
    rows = {
        row["name"]: row for row in map(json.loads, (folder / "mt_bench_judge_prompts.jsonl").read_text().splitlines())
    }
    for one, question in zip(found, [*questions, *questions], strict=True):
        kind = "-math" if question.category in ("math", "reasoning", "coding") else ""
        name = f"single{kind}-v1" + ("-multi-turn" if one.turn == 2 else "")
        first, second = answers[question.question_id]
        values = {"question": question.turns[0], "answer": first, "answer_1": first, "answer_2": second}
        values |= {"question_1": question.turns[0], "question_2": question.turns[1]}
        if kind:
            values |= dict(zip(("ref_answer_1", "ref_answer_2"), references[question.question_id], strict=True))
        assert (one.question_id, one.prompt.name) == (question.question_id, name)
        assert one.body("j")["messages"] == [
            {"role": "system", "content": rows[name]["system_prompt"]},
            {"role": "user", "content": rows[name]["prompt_template"].format(**values)},
        ]
    assert {one.category for one in found if "math" in one.prompt.name} == set(NEED_REFERENCE)


def test_a_stopped_job_goes_on_and_a_finished_one_is_kept(tmp_path: Path) -> None:
    whole = answered(tmp_path, "whole", batch_size=1)

    class Killed(Exception):
        pass

    def kill(what: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        answered(tmp_path, batch_size=1, on_progress=kill)
    with pytest.raises(InputError, match="no finished answers"):
        grade(tmp_path)
    again = answered(tmp_path, batch_size=1)
    assert (again.resumed, again.turns) == (2, 2)
    assert turns_of(Path(again.answers)) == turns_of(Path(whole.answers))
    data = Path(again.answers).read_bytes()
    assert answered(tmp_path, batch_size=1).resumed == 3
    assert Path(again.answers).read_bytes() == data
    with pytest.raises(ResourceError, match="holds a different job"):
        answered(tmp_path, batch_size=1, seed=1)


def test_a_question_that_fills_the_context_has_an_empty_answer_that_is_told(tmp_path: Path) -> None:
    small = changed(tmp_path / "m", max_position_embeddings=24)
    with Speaker(small, template=TEMPLATE, device="cpu") as speaker:
        found = answer_questions(speaker, question_file(tmp_path), out=tmp_path / "out", model_id="tiny")
    empty = sum(turn == "" for turns in turns_of(Path(found.answers)) for turn in turns)
    assert 0 < found.no_room <= empty
    assert found.warnings == (f"{found.no_room} of 6 answers are empty: what was asked fills the model's context",)


@pytest.mark.parametrize(
    ("judgment", "score"),
    [
        ("Rating: [[7]]", 7.0),
        ("[[6.5]] then [[9]]", 6.5),
        ("see [3]. Rating: [[10]]", 10.0),
        ("Rating: [8]", 8.0),
        ("Rating: 8", -1.0),
        ("[[seven]]", -1.0),
        ("[[-3]]", -1.0),
        ("[[ 5 ]]", -1.0),
        ("", -1.0),
    ],
)
def test_ratings_are_read_as_fastchat_reads_them(judgment: str, score: float) -> None:
    assert rating(judgment) == score


def test_a_busy_failing_and_babbling_judge_gives_every_score_in_the_end(tmp_path: Path) -> None:
    answered(tmp_path)
    bad = [
        refusal(429, "slow down", **{"Retry-After": "0.01"}),
        refusal(500, "oops"),
        (200, {}, b"<html>"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": null}}]}'),
    ]

    def answer(request: dict[str, Any]) -> Reply:
        return bad.pop() if bad else judged(request)

    with judge(answer) as (url, seen):
        found = grade(tmp_path, endpoint=Endpoint(url, pause=0.001), parallel=1)
    assert len(seen) == 6 + 5
    rows = [json.loads(line) for line in Path(found.judgments).read_text().splitlines()]
    assert Path(found.judgments).name == "j_1_single.jsonl"
    assert [(row["question_id"], row["turn"]) for row in rows] == [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (3, 2)]
    assert all(row["score"] == score_of(row["user_prompt"]) for row in rows)
    assert rows[1]["judge"] == ["j/1", "single-math-v1"]
    assert rows[1]["user_prompt"].startswith("[Q]the sum of two[R]two[A]")
    assert rows[1]["user_prompt"].endswith(" {kept}")
    means = {score.category: (score.turn_1, score.turn_2, score.mean, score.judged) for score in found.scores}
    scores = {(row["question_id"], row["turn"]): row["score"] for row in rows}
    assert means["math"] == (scores[2, 1], scores[2, 2], (scores[2, 1] + scores[2, 2]) / 2, 2)
    writing = [(scores[1, turn] + scores[3, turn]) / 2 for turn in (1, 2)]
    assert means["writing"] == pytest.approx((*writing, sum(writing) / 2, 4))
    assert means["all"][2] == pytest.approx(sum(scores.values()) / 6)
    each = [(scores[number, 1] + scores[number, 2]) / 2 for number in (1, 2, 3)]
    spread = sum((value - sum(each) / 3) ** 2 for value in each) / 2
    assert found.scores[-1].standard_error == pytest.approx((spread / 3) ** 0.5)
    assert found.warnings == ()


def test_only_what_is_missing_is_asked_again(tmp_path: Path) -> None:
    answered(tmp_path)
    failing = {"on": True}

    def answer(request: dict[str, Any]) -> Reply:
        text = request["body"]["messages"][1]["content"]
        if failing["on"] and "The king said" in text:
            return refusal(503, "down")
        return completion("no number") if "the sum" in text else judged(request)

    with judge(answer) as (url, seen):
        first = grade(tmp_path, endpoint=Endpoint(url, pause=0.001))
        total = first.scores[-1]
        assert (total.judged, total.no_rating, total.failed) == (2, 2, 2)
        assert any("2 requests without a judgment" in warning for warning in first.warnings)
        assert any("2 judgments without a rating" in warning for warning in first.warnings)
        failing["on"], before = False, len(seen)
        second = grade(tmp_path, endpoint=Endpoint(url, pause=0.001))
        assert len(seen) - before == 2
    assert (second.kept, second.scores[-1].judged, second.scores[-1].failed) == (4, 4, 0)


def test_a_judge_that_is_gone_ends_the_job_and_what_is_judged_stays(tmp_path: Path) -> None:
    answered(tmp_path)
    message = r"status 500: gone, 5 requests in a row .*the same command continues"
    with judge(lambda request: refusal(500, "gone")) as (url, seen), pytest.raises(ResourceError, match=message):
        grade(tmp_path, endpoint=Endpoint(url, pause=0.001))
    assert len(seen) >= 5 * 6
    with pytest.raises(Failed, match="no reply"):  # nobody listens there any more
        Endpoint(url, pause=0.001).complete({}, stop=Event())


def test_an_interrupted_judging_keeps_what_it_has(tmp_path: Path) -> None:
    answered(tmp_path)

    def interrupt(what: str, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with judge() as (url, seen):
        with pytest.raises(KeyboardInterrupt):
            grade(tmp_path, endpoint=Endpoint(url), parallel=1, on_progress=interrupt)
        path = tmp_path / "out" / "model_judgment" / "j_1_single.jsonl"
        kept = path.read_bytes()
        assert kept.count(b"\n") == 2
        path.write_bytes(kept + kept[:-20])  # a third and fourth line, cut off while they were written
        before = len(seen)
        again = grade(tmp_path, endpoint=Endpoint(url))
    assert (again.kept, again.scores[-1].judged, len(seen) - before) == (2, 6, 4)
    assert path.read_bytes().count(b"\n") == 6


def test_the_key_goes_to_the_judge_and_nowhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered(tmp_path)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with judge() as (url, seen):
        grade(tmp_path, endpoint=Endpoint(url + "/chat/completions/", key_env="JUDGE_KEY"))
    assert {request["key"] for request in seen} == {f"Bearer {KEY}"}
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(KEY.encode() in path.read_bytes() for path in files)
    with judge() as (url, seen):
        Endpoint(url).complete(
            json.loads((tmp_path / "out" / "requests.jsonl").read_text().splitlines()[0])["body"], stop=Event()
        )
    assert seen[0]["key"] is None
    message = r"status 401: wrong key … \(hint: .*key_env"
    with judge(lambda request: refusal(401, f"wrong key {KEY}")) as (url, _), pytest.raises(UsageError) as error:
        Endpoint(url, key_env="JUDGE_KEY").complete(seen[0]["body"], stop=Event())
    assert re.search(message, str(error.value))
    assert KEY not in str(error.value)


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    body = {"model": "j", "messages": [{"role": "system"}, {"role": "user"}], "temperature": 0, "max_tokens": 2048}
    with (
        judge() as (elsewhere, stolen),
        judge(lambda request: (307, {"Location": elsewhere + "/chat/completions"}, b"")) as (url, _),
        pytest.raises(UsageError, match="status 307"),
    ):
        Endpoint(url, key_env="JUDGE_KEY").complete(body, stop=Event())
    assert stolen == []


@pytest.mark.parametrize(
    ("url", "key", "message"),
    [
        ("ftp://host/v1", None, "not the address of an endpoint; needed such as https://HOST/v1"),
        ("localhost:8000", None, "not the address of an endpoint"),
        ("https://me:word@host/v1", None, "a password in the address; needed key_env=VARIABLE"),
        ("http://judge.example/v1", "JUDGE_KEY", "the key would travel unencrypted; needed https"),
        ("https://judge.example/v1", "NO_SUCH_KEY", "no key in this environment variable"),
    ],
)
def test_a_wrong_endpoint_is_told_before_any_work(
    monkeypatch: pytest.MonkeyPatch, url: str, key: str | None, message: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with pytest.raises(UsageError, match=message) as error:
        Endpoint(url, key_env=key)
    assert "word" not in str(error.value).replace("password", "")


def test_requests_are_judged_elsewhere_and_read_back(tmp_path: Path) -> None:
    answered(tmp_path)
    unjudged = grade(tmp_path)
    assert (unjudged.scores[-1].mean, unjudged.scores[-1].failed, unjudged.warnings) == (None, 6, ())
    requests = [json.loads(line) for line in Path(unjudged.requests).read_text().splitlines()]
    assert {row["url"] for row in requests} == {"/v1/chat/completions"}
    results = []
    for row in requests:
        reply = json.loads(judged(row)[2])
        results.append(
            {"id": "b", "custom_id": row["custom_id"], "response": {"status_code": 200, "body": reply}, "error": None}
        )
    results[1] |= {"response": None, "error": {"code": "x"}}
    path = lines(tmp_path / "results.jsonl", results)
    found = grade(tmp_path, results=path)
    assert (found.scores[-1].judged, found.scores[-1].failed) == (5, 1)
    assert "1 rows of the results report a failure" in found.warnings
    with judge() as (url, seen):
        whole = grade(tmp_path, endpoint=Endpoint(url))
    assert (len(seen), whole.kept, whole.scores[-1].judged) == (1, 5, 6)
    wrong: list[tuple[Callable[[list[dict[str, Any]]], object], str]] = [
        (lambda rows: rows.append(rows[0]), r"results\.jsonl:7: a second result for mt-bench-1-1-"),
        (lambda rows: rows[0].update(custom_id="mt-bench-1-1-000000000000"), r"results\.jsonl:1: custom_id 'mt-bench"),
    ]
    for spoil, message in wrong:
        rows = json.loads(json.dumps(results))
        spoil(rows)
        with pytest.raises(InputError, match=message):
            grade(tmp_path, results=lines(path, rows))


def test_bad_files_are_one_line_and_nothing_is_asked(tmp_path: Path) -> None:
    answered(tmp_path)
    with judge() as (url, seen):
        endpoint = Endpoint(url)
        with pytest.raises(InputError, match=r"question 2 \(math\): no reference answer; needed references=FILE"):
            grade(tmp_path, references=None, endpoint=endpoint)
        rows = [json.loads(line) for line in prompt_file(tmp_path).read_text().splitlines()]
        rows[1]["prompt_template"] = "{question.__class__}"
        hostile = lines(tmp_path / "hostile.jsonl", rows)
        with pytest.raises(InputError, match=r"hostile\.jsonl:2: field \{question\.__class__\}"):
            grade(tmp_path, prompts=hostile, endpoint=endpoint)
        short = lines(tmp_path / "short.jsonl", rows[2:])
        with pytest.raises(InputError, match=r"short\.jsonl: no prompt single-v1; needed FastChat's"):
            grade(tmp_path, prompts=short, endpoint=endpoint)
        path = tmp_path / "out" / "model_answer" / "tiny.jsonl"
        path.write_text(path.read_text().replace("tiny", "Tiny"))
        with pytest.raises(InputError, match="differs from the manifest's"):
            grade(tmp_path, endpoint=endpoint)
    assert seen == []
    twice = lines(tmp_path / "twice.jsonl", [{"question_id": 1, "category": "x", "turns": ["a"]}] * 2)
    with pytest.raises(InputError, match=r"twice\.jsonl:2: question 1 again"):
        read_questions(twice)


def test_the_verb_from_questions_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, questions = tmp_path / "out", question_file(tmp_path)
    shutil.copytree(models()[1], tmp_path / "tiny-moe")
    command = ["mt-bench", str(tmp_path / "tiny-moe"), f"template={TEMPLATE}", "max_new_tokens=6", "device=cpu"]
    given = [f"prompts={prompt_file(tmp_path)}", f"references={reference_file(tmp_path)}"]
    assert main([*command, f"questions={questions}", "--out", str(out), *given]) == 0
    shown = capsys.readouterr().out
    assert f"{out}/model_answer/tiny-moe.jsonl: 3 questions" in shown
    assert f"no judgments yet: {out}/requests.jsonl holds 6 requests" in shown
    small = changed(tmp_path / "small", max_position_embeddings=24)
    more = [f"questions={questions}", "--out", str(tmp_path / "cut")]
    assert main(["mt-bench", str(small), *command[2:], *more, *given]) == 0
    warned = capsys.readouterr().err
    assert "answers are empty: what was asked fills the model's context" in warned
    assert "predefined maximum length" not in warned
    with judge() as (url, seen):
        assert main(["mt-bench", str(out), *given, f"judge={url}", "judge_model=j"]) == 0
        assert main(["mt-bench", str(out), *given, f"judge={url}", "judge_model=j", "--json"]) == 0
        assert len(seen) == 6
    lines_, found = capsys.readouterr().out.strip().rsplit("\n", 1)
    table = {row[0]: row[1:] for line in lines_.splitlines() if (row := line.split())}
    total = json.loads(found)["judged"]["scores"][-1]
    assert table["all"][:3] == [f"{total[name]:.2f}" for name in ("turn_1", "turn_2", "mean")]
    assert table["all"][-3:] == ["6", "0", "0"]
    assert main(["mt-bench", str(out)]) == 2
    assert "answers are all there; needed prompts=FILE" in capsys.readouterr().err
    assert main(["mt-bench", str(out), f"judge={url}"]) == 2
    assert "no prompts for the judge; needed prompts=FILE" in capsys.readouterr().err
    assert main(["mt-bench", str(out), *given, f"judge={url}", "--offline"]) == 2
    assert "judge with --offline" in capsys.readouterr().err
