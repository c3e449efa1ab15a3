"""Where strangers' chat templates are rendered: a process of its own with limits on time, memory and size.

Jinja cannot be interrupted from within, and a template is a program: `{% for i in range(99999) %}` in itself, or
`'a' * 10**9`. The process (`tune/sandbox.py`) is started once and serves every conversation.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.data.reader import BadDocument
from prismoe.errors import InputError
from prismoe.tune import sandbox

if TYPE_CHECKING:
    from prismoe.tune.conversations import Message

__all__ = ["Guard", "Shown"]

WALL_SECONDS = 60.0  # for one request, of which `sandbox.SECONDS` may be processor time; a busy machine waits
MAX_REPLY = 256 << 20
_NEEDED = ("PATH", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH")  # where the interpreter may find itself and Jinja


@dataclass(frozen=True, slots=True)
class Shown:
    """A rendered conversation: `spans` are the (begin, end) characters of the answers, end-of-turn included."""

    text: str
    spans: tuple[tuple[int, int], ...]


class Guard:
    """The guarded process of one template; a context manager.

    Args:
        source: Jinja.
        variables: what the template may use beside the messages: the tokenizer's special tokens as text.
        where: what errors name: the template.

    Raises:
        InputError: the template is no Jinja, or breaks the limits already when it is compiled.
    """

    def __init__(self, source: str, *, variables: Mapping[str, str], where: str) -> None:
        self.where = where
        self._rest = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", sandbox.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(sandbox.__file__).parent,
            env={"PYTHONHASHSEED": "0", **{name: os.environ[name] for name in _NEEDED if name in os.environ}},
            start_new_session=True,  # Ctrl-C is for the run, which then closes this
        )
        self._send({"template": source, "variables": dict(variables)})
        self.marks: bool = self._reply("")["marks"]

    def __enter__(self) -> Guard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        process = self.__dict__.get("_process")
        if process is None:
            return
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):  # what was still to be written is not wanted any more
                pipe.close()

    def render(self, messages: Sequence[Message], *, prompt: bool = False, where: str = "") -> Shown:
        """The text of a conversation and where its answers are; with `prompt` up to where the next answer begins.

        Raises:
            BadDocument: the template refuses this conversation, in its own words, or it has no generation marks and
                the answers cannot be told from the rest.
            InputError: the template broke a limit.
        """
        (found,) = self.render_all([(messages, where)], prompt=prompt)
        if isinstance(found, BadDocument):
            raise found
        return found

    def render_all(
        self, batch: Sequence[tuple[Sequence[Message], str]], *, prompt: bool = False
    ) -> Iterator[Shown | BadDocument]:
        """Many at once, given with their places; refused ones in their place. One at a time, processes would wait for
        each other. All must be taken before anything else is asked.
        """
        self._send(
            [
                {"prompt": prompt, "messages": [{"role": turn.role, "content": turn.content} for turn in messages]}
                for messages, _ in batch
            ]
        )
        for _, where in batch:
            try:
                found = self._reply(where)
            except BadDocument as error:
                yield error
            else:
                yield Shown(found["text"], tuple((begin, end) for begin, end in found["spans"]))

    def _send(self, request: object) -> None:
        if self._process.poll() is not None:
            raise InputError("the process of this template has ended", where=self.where)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended("") from None

    def _reply(self, where: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._line(where))
        if "error" not in found:
            return found
        told = "".join(letter for letter in " ".join(found["error"].split())[:200] if letter.isprintable())
        if found["fatal"]:
            self.close()
            raise InputError(told, where=self.where, hint=f"at {where}" if where else "")
        if reason := found.get("reason"):
            raise BadDocument(told, reason=reason, where=where)
        raise BadDocument(f"refused by the template ({told})", reason="refused by the template", where=where)

    def _line(self, where: str) -> bytes:
        """The next line of the process's output."""
        assert self._process.stdout is not None
        output = self._process.stdout.fileno()
        line, complete, self._rest = self._rest.partition(b"\n")
        if complete:
            return line
        parts, size = [line], 0
        until = time.monotonic() + WALL_SECONDS
        while b"\n" not in parts[-1]:
            ready = select.select([output], [], [], max(0.0, until - time.monotonic()))[0]
            if not ready or size > MAX_REPLY:
                self.close()
                told = "a reply without an end" if ready else f"took more than {WALL_SECONDS:.0f} s"
                raise InputError(told, where=self.where, hint=f"at {where}" if where else "")
            data = os.read(output, 1 << 20)
            if not data:
                raise self._ended(where)
            parts.append(data)
            size += len(data)
        line, _, self._rest = b"".join(parts).partition(b"\n")
        return line

    def _ended(self, where: str) -> InputError:
        code = self._process.wait()
        self.close()
        limit = f"took more than {sandbox.SECONDS} s of processor time for one conversation"
        found = limit if code == -signal.SIGXCPU else f"its process ended with status {code}"
        return InputError(found, where=self.where, hint=f"at {where}" if where else "")
