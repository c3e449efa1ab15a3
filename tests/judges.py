"""A stand-in for a judge: a server on 127.0.0.1 that speaks chat completions, and MT-Bench's files in small."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

QUESTIONS = (
    (1, "writing", ("Once upon a time", "the end")),
    (2, "math", ("the sum of two", "add first")),
    (3, "writing", ("The king said", "no one")),
)
_PROMPTS = {
    "single-v1": "[Q]{question}[A]{answer}",
    "single-math-v1": "[Q]{question}[R]{ref_answer_1}[A]{answer} {{kept}}",
    "single-v1-multi-turn": "[Q]{question_1}[A]{answer_1}[Q]{question_2}[A]{answer_2}",
    "single-math-v1-multi-turn": "[R]{ref_answer_1}|{ref_answer_2}[Q]{question_1}{question_2}[A]{answer_1}{answer_2}",
}
Reply = tuple[int, dict[str, str], bytes]
"""Status, headers and body."""


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question_file(folder: Path) -> Path:
    rows = [{"question_id": number, "category": kind, "turns": list(turns)} for number, kind, turns in QUESTIONS]
    return lines(folder / "questions.jsonl", rows)


def prompt_file(folder: Path) -> Path:
    single = {"type": "single", "system_prompt": "Judge.", "output_format": "[[rating]]"}
    rows = [{**single, "name": name, "prompt_template": text} for name, text in _PROMPTS.items()]
    return lines(folder / "prompts.jsonl", [{"type": "pairwise", "name": "pair-v2"}, *rows])


def reference_file(folder: Path) -> Path:
    row = {"question_id": 2, "choices": [{"index": 0, "turns": ["two", "three"]}]}
    return lines(folder / "references.jsonl", [row])


def completion(text: str) -> Reply:
    """What an endpoint says."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "x", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
    return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()


def refusal(status: int, message: str, **headers: str) -> Reply:
    """What it says when it does not."""
    body = {"error": {"message": message, "type": "x", "param": None, "code": None}}
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()


def score_of(prompt: str) -> int:
    """The stand-in's opinion: 1 to 10, by the length of what it is asked."""
    return 1 + len(prompt) % 10


def judged(request: dict[str, Any]) -> Reply:
    """A judgment in the words that the benchmark asks for."""
    return completion(f"Fine. Rating: [[{score_of(request['body']['messages'][1]['content'])}]]")


@contextmanager
def judge(answer: Callable[[dict[str, Any]], Reply] = judged) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, requests so far) of a server that answers each request, checked against the protocol."""
    seen: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            request = {"path": self.path, "body": body, "key": self.headers.get("Authorization")}
            seen.append(request)
            right = self.headers["Content-Type"] == "application/json" and re.fullmatch(
                "/v1/chat/completions", self.path
            )
            right = right and [row["role"] for row in body["messages"]] == ["system", "user"]
            right = right and isinstance(body["model"], str) and body["temperature"] == 0 and body["max_tokens"] == 2048
            status, headers, data = answer(request) if right else refusal(400, "not the protocol")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
        finally:
            server.shutdown()
            thread.join()
