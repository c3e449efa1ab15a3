"""Prompts out of files: plain text to go on with, or conversations whose last question is to be answered."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.data.blocks import read_lines
from prismoe.data.reader import BadDocument, read_object, too_long
from prismoe.errors import InputError
from prismoe.tune.conversations import SUFFIXES, Message
from prismoe.tune.forms import recognise, turns

if TYPE_CHECKING:
    from prismoe.generate.speaker import Speaker

__all__ = ["Prompt", "read_prompts"]


@dataclass(frozen=True)
class Prompt:
    """`text` to go on with, or the `messages` of a conversation that an answer is to follow; `where` is file:line."""

    text: str | None
    messages: tuple[Message, ...] = ()
    where: str = ""
    line: int = 0

    @classmethod
    def plain(cls, text: str, *, chat: bool, where: str = "", line: int = 0) -> Prompt:
        """Of text alone: with `chat` it is a question."""
        if chat:
            return cls(None, (Message("user", text),), where, line)
        return cls(text, (), where, line)

    def ids(self, speaker: Speaker) -> list[int]:
        """As the model reads it.

        Raises:
            UsageError: no tokens.
            BadDocument: the template refuses it.
        """
        if self.text is not None:
            return speaker.text_ids(self.text)
        return speaker.prompt_ids(self.messages, where=self.where)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: what a row of answers says of its question."""
        if self.text is not None:
            return {"prompt": self.text}
        return {"messages": [{"role": turn.role, "content": turn.content} for turn in self.messages]}


def read_prompts(path: Path, *, chat: bool) -> list[Prompt]:
    """Every prompt of a file, in order; blank lines are none.

    A `.txt` file holds one a line. A row of `.jsonl` (also `.zst` and `.gz`) holds text under `prompt`, or is a
    conversation in a form of `tune.forms`; a last answer that stands there already is left out.

    Args:
        path: the file.
        chat: text is a question to be answered, not a beginning to go on with.

    Raises:
        InputError: another kind of file, or one without prompts.
        BadDocument: a row without a question, with file and line.
    """
    name = path.name
    if not name.endswith((".txt", *SUFFIXES)):
        raise InputError("not a kind of file that is read", where=str(path), needed=", ".join((".txt", *SUFFIXES)))
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    found = list(_rows(path, name.endswith(".txt"), chat))
    if not found:
        raise InputError("no prompts in it", where=str(path))
    return found


def _rows(path: Path, text: bool, chat: bool) -> Iterator[Prompt]:
    for number, (line, _) in enumerate(read_lines(path), start=1):
        where = f"{path}:{number}"
        if line is None:
            raise too_long(where)
        if not line.strip():
            continue
        if text:
            yield Prompt.plain(_decoded(line, where), chat=chat, where=where, line=number)
            continue
        row = read_object(line, where, first=number == 1)
        if isinstance(row.get("prompt"), str):
            _check_characters(row["prompt"], where)
            yield Prompt.plain(row["prompt"], chat=chat, where=where, line=number)
            continue
        said = [Message(role, content) for role, content in turns(row, recognise(row, where), where)]
        if said and said[-1].role == "assistant":
            said.pop()
        if not said or said[-1].role != "user" or not said[-1].content.strip():
            raise BadDocument("no question to answer", reason="no question", where=where, needed="a last user turn")
        for message in said:
            _check_characters(message.content, where)
        yield Prompt(None, tuple(said), where, number)


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode().removeprefix("\ufeff").rstrip("\r")
    except UnicodeDecodeError as error:
        raise BadDocument("not UTF-8", reason="not UTF-8", where=where) from error


def _check_characters(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(
            "half of a surrogate pair, which is no character", reason="not a character", where=where
        ) from error
