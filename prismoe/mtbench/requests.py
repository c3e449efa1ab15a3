"""What a judge is asked: one request for each turn of each answer, in the form of the OpenAI batch files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prismoe.data.blocks import read_lines
from prismoe.data.reader import read_object
from prismoe.errors import InputError
from prismoe.folder import write_atomic
from prismoe.mtbench.questions import NEED_REFERENCE, JudgePrompt, Question

__all__ = ["JudgeRequest", "make_requests", "read_results", "reply_text", "write_requests"]

MAX_TOKENS = 2048  # FastChat's, for a judgment


@dataclass(frozen=True)
class JudgeRequest:
    """One answer to grade: `turn` 1 alone, or `turn` 2 with the whole conversation."""

    question_id: int
    category: str
    turn: int
    prompt: JudgePrompt
    text: str

    @property
    def custom_id(self) -> str:
        """Names the request and what it asks, so that a result cannot be taken for another one's."""
        asked = hashlib.sha256(f"{self.prompt.system}\0{self.text}".encode(errors="surrogatepass")).hexdigest()
        return f"mt-bench-{self.question_id}-{self.turn}-{asked[:12]}"

    def body(self, model: str) -> dict[str, Any]:
        """The JSON of a chat completion; FastChat judges at temperature 0."""
        messages = [
            {"role": "system", "content": self.prompt.system},
            {"role": "user", "content": self.text},
        ]
        return {"model": model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}


def make_requests(
    questions: Sequence[Question],
    answers: Mapping[int, tuple[str, ...]],
    prompts: Mapping[str, JudgePrompt],
    references: Mapping[int, tuple[str, ...]] | None,
) -> list[JudgeRequest]:
    """All first turns, then all second ones, with reference answers for maths, reasoning and coding.

    Raises:
        InputError: a question without an answer, or without the reference that its category needs.
    """
    found: list[JudgeRequest] = []
    for turn in (1, 2):
        for question in (one for one in questions if len(one.turns) >= turn):
            number = question.question_id
            answer = answers.get(number, ())
            if len(answer) < len(question.turns):
                raise InputError(f"{len(answer)} of {len(question.turns)} turns answered", where=f"question {number}")
            values = {"question": question.turns[0], "answer": answer[0]}
            if turn == 2:
                pairs = zip(("question", "answer"), (question.turns, answer), strict=True)
                values = {f"{name}_{place}": texts[place - 1] for name, texts in pairs for place in (1, 2)}
            if kind := "-math" if question.category in NEED_REFERENCE else "":
                reference = (references or {}).get(number, ())
                if len(reference) < turn:
                    where = f"question {number} ({question.category})"
                    needed = "references=FILE, FastChat's reference_answer/gpt-4.jsonl"
                    raise InputError("no reference answer", where=where, needed=needed)
                values |= {f"ref_answer_{place}": text for place, text in enumerate(reference, start=1)}
            prompt = prompts[f"single{kind}-v1{'-multi-turn' if turn == 2 else ''}"]
            found.append(JudgeRequest(number, question.category, turn, prompt, prompt.fill(values)))
    return found


def write_requests(path: Path, requests: Sequence[JudgeRequest], *, model: str) -> None:
    """One request a line, as the batch interfaces of OpenAI and vLLM take them.

    Raises:
        ResourceError: cannot be written.
    """
    rows = [
        {"custom_id": one.custom_id, "method": "POST", "url": "/v1/chat/completions", "body": one.body(model)}
        for one in requests
    ]
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_results(path: Path, requests: Sequence[JudgeRequest]) -> tuple[dict[str, str], int]:
    """What a judge said elsewhere, by `custom_id`, and how many of the rows report a failure.

    Raises:
        InputError: not readable, a row that is no result or answers none of `requests`, or two for one; with file and
            line.
    """
    known = {one.custom_id for one in requests}
    found: dict[str, str] = {}
    failed = 0
    for number, (line, _) in enumerate(read_lines(path), start=1):
        where = f"{path}:{number}"
        if line is not None and not line.strip():
            continue
        row = read_object(line or b"", where, first=number == 1)
        name, reply = row.get("custom_id"), row.get("response")
        if name not in known:
            needed = "a custom_id of requests.jsonl, written for these answers and prompts"
            raise InputError(f"custom_id {str(name)[:80]!r}", where=where, needed=needed)
        if name in found:
            raise InputError(f"a second result for {name}", where=where)
        good = isinstance(reply, dict) and not row.get("error") and reply.get("status_code", 200) == 200
        if (text := reply_text(reply.get("body")) if good and reply else None) is None:
            failed += 1
        else:
            found[name] = text
    return found, failed


def reply_text(body: Any) -> str | None:
    """The text of a chat completion, None where it is none."""
    try:
        content = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None
