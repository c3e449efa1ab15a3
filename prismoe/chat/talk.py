"""Lines in, answers out: the commands of a chat, and Ctrl-C that stops an answer. It writes through a `Show`."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from prismoe.chat.dialogue import Answer, Dialogue
from prismoe.chat.tokenexperts import TokenExperts
from prismoe.data.reader import BadDocument
from prismoe.errors import UsageError

__all__ = ["HELP", "Show", "talk"]

HELP = """\
/reset         forget the conversation
/system TEXT   what stands before it (/system alone: nothing); the conversation begins again
/help          this
/quit          leave (also Ctrl-D); Ctrl-C stops an answer and stays
Anything else is your turn; //text begins it with a slash. When a conversation grows beyond the model's context, its
oldest turns are forgotten, and you are told.
With experts=true each answer is followed by a table of its tokens: for each layer that has a router, the numbers of the
experts which the token went through when the model read it to write the next one, best first. The last token of an
answer was not read any more and has none."""


class Show(Protocol):
    """Where a chat is seen."""

    def text(self, text: str) -> None:
        """The next part of an answer."""

    def end(self) -> None:
        """The answer ends."""

    def experts(self, found: TokenExperts) -> None:
        """The experts of the answer's tokens."""

    def note(self, text: str) -> None:
        """A remark of the program's."""

    def error(self, text: str) -> None:
        """A turn that cannot be taken."""


def talk(lines: Iterable[str], dialogue: Dialogue, show: Show, *, catch: bool) -> list[Answer]:
    """Take each line as a turn or a command until they end or /quit; the answers.

    With `catch` Ctrl-C stops the answer that is being written; a second one, before it has stopped, ends the program.
    """
    answers = []
    for line in lines:
        text = line.strip()
        if not text:
            continue
        if text.startswith("/") and not text.startswith("//"):
            if _command(text, dialogue, show):
                break
            continue
        if (
            answer := _turn(text.removeprefix("/") if text.startswith("//") else text, dialogue, show, catch)
        ) is not None:
            answers.append(answer)
    return answers


def _command(text: str, dialogue: Dialogue, show: Show) -> bool:
    """Obey one command; whether to leave."""
    name, _, rest = text.partition(" ")
    if name == "/quit":
        return True
    if name == "/reset":
        dialogue.reset()
        show.note("the conversation is forgotten")
    elif name == "/system":
        dialogue.reset()
        dialogue.system = rest.strip()
        show.note(f"system: {dialogue.system}" if dialogue.system else "no system sentence")
    elif name == "/help":
        show.note(HELP)
    else:
        show.error(f"unknown command {name}; needed /reset, /system, /help or /quit (hint: //… sends a slash)")
    return False


def _turn(question: str, dialogue: Dialogue, show: Show, catch: bool) -> Answer | None:
    begun = False
    with _interruptible(catch) as check:

        def hear(text: str) -> None:
            nonlocal begun
            begun = begun or bool(text)
            show.text(text)
            check()

        def drop(turns: int) -> None:
            one = turns == 1
            show.note(
                f"the {'oldest turn does' if one else f'{turns} oldest turns do'} not fit the model's context any more"
                f" and {'is' if one else 'are'} forgotten"
            )

        try:
            answer = dialogue.ask(question, on_text=hear, on_drop=drop)
        except (BadDocument, UsageError) as error:
            show.error(str(error))
            return None
    show.end()
    if answer.finish != "end":
        show.note(
            {"length": "(cut at max_new_tokens or the end of the context)", "stopped": "(stopped)"}[answer.finish]
        )
    elif not begun:
        show.note("(an empty answer)")
    if answer.experts is not None:
        show.experts(answer.experts)
    return answer


@contextmanager
def _interruptible(catch: bool) -> Iterator[Any]:
    """A function that raises `Stopped` once Ctrl-C was pressed. An exception out of nowhere could come between a
    request to the template's process and its reply.
    """
    from prismoe.generate.rows import Stopped

    pressed = False

    def press(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    def check() -> None:
        if pressed:
            raise Stopped

    before = signal.signal(signal.SIGINT, press) if catch else None
    try:
        yield check
    finally:
        if catch:
            signal.signal(signal.SIGINT, before)
