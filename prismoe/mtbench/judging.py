"""Answers judged: by an endpoint, by results from elsewhere, or not yet, with the requests written for later."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import Any

from prismoe.errors import InputError, ResourceError, UsageError
from prismoe.folder import Manifest, claim, write_atomic, write_json_atomic
from prismoe.mtbench.answering import KIND, QUESTIONS
from prismoe.mtbench.endpoint import Endpoint, Failed
from prismoe.mtbench.questions import read_answers, read_judge_prompts, read_questions
from prismoe.mtbench.requests import JudgeRequest, make_requests, read_results, write_requests
from prismoe.mtbench.scores import CategoryScore, category_scores, rating
from prismoe.progress import Progress, quiet
from prismoe.room import unwritten

__all__ = ["Judged", "judge_answers"]

REQUESTS = "requests.jsonl"
GIVE_UP = 5  # failures in a row: the endpoint is gone, and what is judged is kept

Judgments = dict[tuple[int, int], dict[str, Any]]


@dataclass(frozen=True)
class Judged:
    """`scores` by category, "all" last, in the folder `out`; `kept` judgments were there before this command.

    `judgments` is FastChat's file of them; `requests` the file to judge them elsewhere. Without any judgment `scores`
    has no means.
    """

    out: str
    model_id: str
    judge: str
    requests: str
    judgments: str
    kept: int
    scores: tuple[CategoryScore, ...]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def judge_answers(
    out: Path,
    *,
    prompts: Path,
    judge_model: str,
    references: Path | None = None,
    endpoint: Endpoint | None = None,
    results: Path | None = None,
    parallel: int = 4,
    on_progress: Progress = quiet,
) -> Judged:
    """Grade the answers in a finished folder one by one (FastChat's single-answer grading, prompts v1).

    The requests are written in any case. A judgment that is there already for the same request is kept; a stopped job
    goes on with the rest.

    Args:
        out: a folder of `answer_questions`.
        prompts: FastChat's judge_prompts.jsonl.
        judge_model: what the endpoint calls the judge, and FastChat's file of judgments is named after.
        references: FastChat's reference answers; needed for maths, reasoning and coding.
        endpoint: where to ask.
        results: instead, a file of what was said elsewhere to the requests (the output of a batch).
        parallel: requests at a time.

    Raises:
        InputError: no finished answers in `out`, they were changed, or a file is not what it should be.
        UsageError: the endpoint refuses, or both ways of judging at once.
        ResourceError: the endpoint does not answer any more.
    """
    if endpoint is not None and results is not None:
        raise UsageError("judge and results", needed="one of them")
    if parallel < 1:
        raise UsageError(f"parallel {parallel}", needed="at least 1")
    manifest = Manifest.read(out)
    if manifest is None or manifest.kind != KIND:
        raise InputError("no finished answers", where=str(out), hint="prismoe mt-bench MODEL questions=FILE --out DIR")
    manifest.check(out)
    (answers,) = (name for name in manifest.files if name != QUESTIONS)
    model_id = Path(answers).stem
    wanted = make_requests(
        read_questions(out / QUESTIONS),
        read_answers(out / answers),
        read_judge_prompts(prompts),
        None if references is None else read_answers(references),
    )
    name = re.sub(r"[^\w.-]+", "_", judge_model)
    path, failed = out / "model_judgment" / f"{name}_single.jsonl", 0
    with claim(out, kind=KIND, key=manifest.key):
        write_requests(out / REQUESTS, wanted, model=judge_model)
        found = _kept(path, wanted, judge_model)
        kept = len(found)
        rest = [one for one in wanted if (one.question_id, one.turn) not in found]
        replies: Iterable[tuple[JudgeRequest, str]] = ()
        if results is not None:
            said, failed = read_results(results, wanted)
            replies = [(one, said[one.custom_id]) for one in rest if one.custom_id in said]
        elif endpoint is not None:
            replies = _asked(endpoint, rest, judge_model, parallel, on_progress)
        if results is not None or endpoint is not None:
            path.parent.mkdir(exist_ok=True)
            _write(path, found)
            _append(path, found, replies, judge_model, model_id)
            _write(path, found)
        scores = tuple(category_scores(wanted, found))
        judged = Judged(
            out=str(out),
            model_id=model_id,
            judge=judge_model,
            requests=str(out / REQUESTS),
            judgments=str(path) if found else "",
            kept=kept,
            scores=scores,
            warnings=tuple(_warnings(scores[-1], found, failed, asked=results is not None or endpoint is not None)),
        )
        if found:
            write_json_atomic(out / f"scores-{name}.json", judged.to_dict())
    return judged


def _kept(path: Path, wanted: Sequence[JudgeRequest], judge: str) -> Judgments:
    """Judgments of earlier commands that answer one of the requests as they are now."""
    if not path.is_file():
        return {}
    asked = {(one.question_id, one.turn): [one.text, [judge, one.prompt.name]] for one in wanted}
    found: Judgments = {}
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            place = (row["question_id"], row["turn"])
            if [row["user_prompt"], row["judge"]] == asked.get(place) and isinstance(row["judgment"], str):
                found[place] = {**row, "score": rating(row["judgment"])}
        except (ValueError, KeyError, TypeError) as error:
            raise InputError("not a file of judgments", where=str(path), hint="move it away") from error
    return found


def _asked(
    endpoint: Endpoint, requests: Sequence[JudgeRequest], model: str, parallel: int, on_progress: Progress
) -> Iterator[tuple[JudgeRequest, str]]:
    """Replies as they come. Those that fail are left out, until too many do."""
    stop, in_a_row, done = Event(), 0, 0
    on_progress("judgments", 0, len(requests))
    with ThreadPoolExecutor(parallel) as pool:
        waiting: dict[Future[str], JudgeRequest] = {
            pool.submit(endpoint.complete, one.body(model), stop=stop): one for one in requests
        }
        try:
            for future in as_completed(waiting):
                done += 1
                try:
                    text = future.result()
                except Failed as error:
                    in_a_row += 1
                    if in_a_row == min(GIVE_UP, len(requests)):
                        found = f"{error.found}, {in_a_row} requests in a row"
                        hint = "what is judged is kept, the same command continues"
                        raise ResourceError(found, where=error.where, hint=hint) from error
                    continue
                in_a_row = 0
                yield waiting[future], text  # kept, before anything else can happen
                on_progress("judgments", done, len(requests))
        finally:  # also when the one who reads has stopped
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _append(
    path: Path, found: Judgments, replies: Iterable[tuple[JudgeRequest, str]], judge: str, model_id: str
) -> None:
    """Add judgments to `found`, each on disk as soon as it is there: they cost money."""
    try:
        with path.open("ab") as file:
            for request, text in replies:
                row = {
                    "question_id": request.question_id,
                    "model": model_id,
                    "judge": [judge, request.prompt.name],
                    "user_prompt": request.text,
                    "judgment": text,
                    "score": rating(text),
                    "turn": request.turn,
                    "tstamp": time.time(),
                }
                found[request.question_id, request.turn] = row
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise unwritten(path, error) from error


def _write(path: Path, found: Judgments) -> None:
    """The file in the order of turns and questions, whatever the order in which replies came."""
    rows = [found[place] for place in sorted(found, key=lambda place: (place[1], place[0]))]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _warnings(total: CategoryScore, found: Mapping[Any, Any], failed: int, *, asked: bool) -> Iterator[str]:
    if asked and total.failed:
        yield f"{total.failed} requests without a judgment are in no mean; the same command asks for them again"
    if failed:
        yield f"{failed} rows of the results report a failure"
    if total.no_rating:
        yield f"{total.no_rating} judgments without a rating are in no mean"
    if beyond := sum(not 1 <= row["score"] <= 10 for row in found.values()) - total.no_rating:
        yield f"{beyond} ratings outside 1 to 10, counted as FastChat counts them"
