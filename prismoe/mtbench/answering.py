"""A model's answers to the questions of MT-Bench, two turns each, in FastChat's form."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.errors import UsageError
from prismoe.folder import Manifest, claim, hash_files, versions, write_atomic
from prismoe.generate.sampling import Sampling
from prismoe.generate.speaker import Speaker
from prismoe.mtbench.questions import Question, read_questions
from prismoe.progress import Progress, quiet
from prismoe.room import unwritten
from prismoe.tune.conversations import Message

__all__ = ["KIND", "QUESTIONS", "Answers", "answer_questions", "answers_path"]

KIND = "mt-bench"
QUESTIONS = "question.jsonl"


@dataclass(frozen=True)
class Answers:
    """`questions` answered in the folder `out`, `resumed` of them before this command. Of this command's `turns`,
    `cut` ended at the limit and `no_room` are empty because their prompt fills the model's context.
    """

    out: str
    answers: str
    model_id: str
    questions: int
    resumed: int
    turns: int
    cut: int
    no_room: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a person must not miss."""
        if not self.no_room:
            return ()
        return (f"{self.no_room} of {self.turns} answers are empty: what was asked fills the model's context",)


def answers_path(out: Path, model_id: str) -> Path:
    """Where FastChat looks for the answers of a model.

    Raises:
        UsageError: a name that is no file's.
    """
    if not re.fullmatch(r"[\w.-]{1,200}", model_id) or model_id.startswith("."):
        raise UsageError(f"model_id {model_id!r}", needed="letters, digits, _ . and - only")
    return out / "model_answer" / f"{model_id}.jsonl"


def answer_questions(
    speaker: Speaker,
    questions: Path,
    *,
    out: Path,
    model_id: str,
    max_new_tokens: int = 1024,
    seed: int = 0,
    batch_size: int = 8,
    force: bool = False,
    on_progress: Progress = quiet,
) -> Answers:
    """Answer every question at the temperature of its category; a stopped job goes on, a finished one is kept.

    As in FastChat each question draws with the same seed, and an answer is stripped of control tokens before it
    becomes part of the second turn.

    Raises:
        InputError: the questions or the model cannot be read, or the template refuses a question.
        ResourceError: `out` holds something else, or cannot be written.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size}", needed="at least 1")
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=seed)
    asked = read_questions(questions)
    path = answers_path(out, model_id)
    data = questions.read_bytes()
    assert speaker.template is not None, "opened without a template"
    config = {
        **{"template": speaker.template.sha256, "questions": hashlib.sha256(data).hexdigest(), "model_id": model_id},
        **{"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size},
    }
    facts = {"model": speaker.checkpoint.fingerprint, **config, "versions": versions()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    counts = {"turns": 0, "cut": 0, "no_room": 0}
    with claim(out, kind=KIND, key=key, force=force):
        done = Manifest.read(out)
        if done is not None:
            done.check(out)
            return Answers(str(out), str(path), model_id, len(asked), len(asked), **counts)
        path.parent.mkdir(exist_ok=True)
        write_atomic(out / QUESTIONS, data)
        kept = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
        kept = kept[: len(kept) // batch_size * batch_size]  # whole batches: rounding depends on what is in one
        write_atomic(path, b"".join(line + b"\n" for line in kept))
        try:
            with path.open("ab") as file:
                for first in range(len(kept), len(asked), batch_size):
                    on_progress("questions", first, len(asked))
                    for row in _batch(speaker, asked[first : first + batch_size], sampling, model_id, counts):
                        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise unwritten(path, error) from error
        on_progress("questions", len(asked), len(asked))
        names = [QUESTIONS, str(path.relative_to(out))]
        parents = {"model": speaker.checkpoint.fingerprint}
        Manifest(KIND, parents=parents, config=config, files=hash_files(out, names), key=key).write(out)
    return Answers(str(out), str(path), model_id, len(asked), len(kept), **counts)


def _batch(
    speaker: Speaker, questions: Sequence[Question], sampling: Sampling, model_id: str, counts: dict[str, int]
) -> list[dict[str, Any]]:
    said: list[list[Message]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        prompts, places = [], []
        for place, question in enumerate(questions):
            if turn >= len(question.turns):
                continue
            said[place].append(Message("user", question.turns[turn]))
            where = f"question {question.question_id}, turn {turn + 1}"
            ids = speaker.prompt_ids(said[place], where=where)
            counts["turns"] += 1
            if speaker.room(ids, sampling) < 1:
                counts["no_room"] += 1
                said[place].append(Message("assistant", ""))
                continue
            # The second turn goes on drawing where the first began anew: another seed, known beforehand.
            own = Sampling(
                temperature=question.temperature,
                max_new_tokens=sampling.max_new_tokens,
                seed=sampling.seed + turn,
            )
            prompts.append((ids, own))
            places.append(place)
        for place, speech in zip(places, speaker.speak(prompts) if prompts else [], strict=True):
            counts["cut"] += not speech.ended
            said[place].append(Message("assistant", speech.text.strip()))
    return [_row(question, messages, model_id) for question, messages in zip(questions, said, strict=True)]


def _row(question: Question, messages: Sequence[Message], model_id: str) -> dict[str, Any]:
    turns = [message.content for message in messages if message.role == "assistant"]
    named = hashlib.sha256(json.dumps([model_id, question.question_id, turns]).encode()).hexdigest()
    return {
        "question_id": question.question_id,
        "answer_id": named[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }
