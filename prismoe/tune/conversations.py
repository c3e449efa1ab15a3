"""Conversations out of files: `.jsonl`, `.jsonl.zst` and `.jsonl.gz`, one row a line, in the forms of `tune.forms`.

Everything that is not taken is counted by reason, with the first place of each; too much of it is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from prismoe.data.blocks import read_lines
from prismoe.data.reader import BadDocument, read_object, too_long
from prismoe.data.sources import expand
from prismoe.errors import InputError, UsageError
from prismoe.tune.forms import Role, Turns, check_name, recognise, turns

__all__ = ["SUFFIXES", "Conversation", "Message", "Refusals", "Role", "find_files", "read_conversations"]

SUFFIXES = (".jsonl", ".jsonl.zst", ".jsonl.gz")
MAX_CHARACTERS = 4 << 20  # of one conversation; the longest real ones have some 10^5


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `content` is text, never empty."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """An optional system message, then user and assistant in turn; the last message is an assistant's.

    `form` is the row's, a name of `tune.forms`. `unanswered` where the row ended with one more message of the user,
    which teaches nothing and is left out.
    """

    messages: tuple[Message, ...]
    file: str
    line: int
    form: str = ""
    unanswered: bool = False

    @property
    def where(self) -> str:
        """file:line."""
        return f"{self.file}:{self.line}"

    @property
    def digest(self) -> bytes:
        """SHA-256 of roles and contents: the conversation's identity, wherever it stands."""
        found = sha256()
        for message in self.messages:
            content = message.content.encode()
            found.update(f"{message.role} {len(content)}\n".encode() + content)
        return found.digest()


@dataclass
class Refusals:
    """Rows not taken: how many for each reason, and the first place of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one row."""
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    @property
    def total(self) -> int:
        """Rows refused for any reason."""
        return self.counts.total()

    def check(self, rows: int, *, limit: float) -> None:
        """Refuse the whole where more than the share `limit` of `rows` was refused.

        Raises:
            InputError: how many for which reasons, with file:line of the first of each.
        """
        if self.total <= limit * rows:
            return
        reasons = ", ".join(f"{count:,} {name} (first {self.first[name]})" for name, count in self.counts.most_common())
        raise InputError(
            f"{self.total:,} of {rows:,} rows refused, {100 * self.total / rows:.3g} %: {reasons}",
            where=next(iter(self.first.values())),
            needed=f"at most {100 * limit:.3g} %",
            hint="mend the rows, or allow more with max_refused",
        )


def find_files(patterns: str | Path | Sequence[str | Path], *, offline: bool = False) -> list[Path]:
    """The files of a path, a glob pattern or `hf://datasets/OWNER/NAME/PATTERN`, or of several, in the order given.

    Raises:
        UsageError: no pattern, or a file named twice.
        InputError: no such file, or a kind of file that is not read.
    """
    patterns = [patterns] if isinstance(patterns, str | Path) else patterns
    if not patterns:
        raise UsageError("no conversations named", needed="files, patterns or hf://datasets/OWNER/NAME/PATTERN")
    found: dict[Path, Path] = {}
    for pattern in patterns:
        for file in expand(str(pattern), "tune.data", offline=offline, suffixes=SUFFIXES):
            if file.resolve() in found:
                raise UsageError(f"{file} is named twice", hint="each conversation is to be learned once an epoch")
            found[file.resolve()] = file
    return list(found.values())


def read_conversations(
    path: Path, *, form: str = "auto", on_bad: Callable[[BadDocument], None] | None = None
) -> Iterator[Conversation]:
    """Every conversation of `path`, in order. Blank lines are skipped, a byte order mark is dropped.

    Args:
        path: a file with one of `SUFFIXES`.
        form: a name of `tune.forms.FORMS`; `auto` takes the form of the first row that has one.
        on_bad: called with each row that is no conversation, instead of raising it.

    Raises:
        UsageError: an unknown form.
        InputError: not readable, damaged, no rows, of no known form, or preferences that nobody asked for.
        BadDocument: invalid JSON, a row of another form, no assistant turn, roles out of order, empty text, an unknown
            role, text that is none; the message names file and line.
    """
    check_name(form)
    found = False
    for number, (line, _) in enumerate(read_lines(Path(path)), start=1):
        where = f"{path}:{number}"
        if line is not None and (not line or line.isspace()):
            continue
        try:
            if line is None:
                raise too_long(where)
            row = read_object(line, where, first=number == 1)
            if form == "auto":
                form = recognise(row, where)
            found = True
            messages, unanswered = _checked(turns(row, form, where), where)
            yield Conversation(messages, str(path), number, form, unanswered)
        except BadDocument as error:
            found = True
            if on_bad is None:
                raise
            on_bad(error)
    if not found:
        raise InputError("no conversations in it", where=str(path))


def _checked(found: Turns, where: str) -> tuple[tuple[Message, ...], bool]:
    """Messages of turns that follow each other as they must, and whether a last question was left out."""
    messages = [Message(role, text) for role, text in found if role != "system" or text.strip()]
    if not any(message.role == "assistant" for message in messages):
        raise BadDocument("no assistant turn", reason="no assistant turn", where=where)
    expected: tuple[Role, ...] = ("system", "user")
    size = 0
    for turn, message in enumerate(messages, start=1):
        if message.role not in expected:
            raise BadDocument(
                f"turn {turn} is {message.role}", reason="roles out of order", where=where, needed=" or ".join(expected)
            )
        if not message.content.strip():
            raise BadDocument(f"turn {turn} ({message.role}) is empty", reason="empty text", where=where)
        size += len(message.content)
        try:
            message.content.encode()
        except UnicodeEncodeError as error:
            raise BadDocument(
                "half of a surrogate pair, which is no character", reason="not a character", where=where
            ) from error
        expected = ("assistant",) if message.role == "user" else ("user",)
    if size > MAX_CHARACTERS:
        raise BadDocument(f"a conversation of {size:,} characters", reason="too long", where=where)
    unanswered = messages[-1].role == "user"
    return tuple(messages[:-1] if unanswered else messages), unanswered
