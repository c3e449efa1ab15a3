"""A conversation that goes on: its history, cut to what the model can read, and answers as they are written."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from prismoe.chat.tokenexperts import ExpertRecord, TokenExperts
from prismoe.errors import UsageError
from prismoe.generate.sampling import Sampling
from prismoe.generate.speaker import Speaker
from prismoe.tune.conversations import Message

__all__ = ["Answer", "Dialogue"]

_HALF = "\ufffd"  # what a decoder writes for a character of which some bytes are still to come


@dataclass(frozen=True)
class Answer:
    """One turn. `dropped` turns, the oldest, did not fit any more before it; `finish` is "end" (the model's own),
    "length" or "stopped". `experts` are there where they were asked for.
    """

    question: str
    text: str
    tokens: int
    finish: str
    dropped: int
    experts: TokenExperts | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {"question": self.question, "text": self.text, "tokens": self.tokens, "finish": self.finish}
        experts = {"experts": self.experts.to_dict()} if self.experts is not None else {}
        return {**found, "dropped": self.dropped, **experts}


class Dialogue:
    """Questions and answers so far, and the sentence `system` before them; a context manager.

    Half of the context at most is kept free for an answer (`max_new_tokens` where that is less): the oldest questions
    go, with their answers, until the rest fits. Answer n of a dialogue draws with the n-th seed from `sampling.seed`.

    Args:
        speaker: opened with a template.
        sampling: how answers are drawn.
        system: what stands before the conversation; empty for nothing.
        experts: record which experts each token went through.

    Raises:
        InputError: experts are asked for and the model has no router.
    """

    def __init__(self, speaker: Speaker, *, sampling: Sampling, system: str = "", experts: bool = False) -> None:
        self._speaker, self._sampling = speaker, sampling
        self.system = system
        self.turns: list[Message] = []
        self._asked = 0
        self._open = ExitStack()
        model = speaker.model  # now: the first question is not to wait for it
        self._record = self._open.enter_context(ExpertRecord.of(model)) if experts else None

    def __enter__(self) -> Dialogue:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def reset(self) -> None:
        """Forget questions and answers; the system sentence stays, and the draws begin again."""
        self.turns.clear()
        self._asked = 0

    def ask(
        self,
        question: str,
        *,
        on_text: Callable[[str], None] = lambda text: None,
        on_drop: Callable[[int], None] = lambda turns: None,
    ) -> Answer:
        """Answer, and remember both. `on_text` is called for each token with what it adds to the text, perhaps nothing;
        `rows.Stopped` raised in it stops the answer, of which what there is stays. `on_drop` gets the number of turns
        that have to go.

        Raises:
            BadDocument: the template refuses the conversation with this question.
            UsageError: nothing in it, or too long even alone. The dialogue is as it was before, in either case.
        """
        if not question.strip():
            raise UsageError("an empty question", needed="text")
        turns, ids = self._fitting(question)
        dropped = (len(self.turns) + 1 - len(turns)) // 2
        if dropped:
            on_drop(dropped)
        sampling = replace(self._sampling, seed=self._sampling.seed + self._asked)
        stream = _Text(self._speaker, on_text)
        record = self._record
        if record is not None:
            record.begin()
        (speech,) = self._speaker.speak(
            [(ids, sampling)], on_pass=None if record is None else record.add, on_token=stream.add
        )
        text = speech.text.strip()
        stream.finish()
        self._asked += 1
        self.turns = [*turns, Message("assistant", text)]
        finish = "end" if speech.ended else "stopped" if stream.stopped else "length"
        experts = None if record is None else record.take([self._speaker.token(number) for number in speech.ids])
        return Answer(question, text, len(speech.ids), finish, dropped, experts)

    def _fitting(self, question: str) -> tuple[list[Message], list[int]]:
        """The newest turns that fit together with the question, and their ids."""
        turns = [*self.turns, Message("user", question)]
        system = [Message("system", self.system)] if self.system.strip() else []
        limit = self._speaker.context
        while True:
            ids = self._speaker.prompt_ids([*system, *turns], where="this conversation")
            if limit is None or len(ids) + min(self._sampling.max_new_tokens, limit // 2) <= limit:
                return turns, ids
            if len(turns) == 1:
                if len(ids) < limit:
                    return turns, ids
                raise UsageError(f"a question of {len(ids):,} ids", needed=f"fewer than the model's {limit:,}")
            turns = turns[2:]


class _Text:
    """Text of ids as they come, whole characters only, without the space that a template puts before an answer."""

    def __init__(self, speaker: Speaker, on_text: Callable[[str], None]) -> None:
        self._speaker, self._on_text = speaker, on_text
        self._ids: list[int] = []
        self._told = ""
        self.stopped = False

    def add(self, number: int) -> None:
        self._ids.append(number)
        self._tell(self._speaker.text(self._ids).strip(), whole=False)

    def finish(self) -> None:
        if not self.stopped:
            self._tell(self._speaker.text(self._ids).strip(), whole=True)

    def _tell(self, text: str, *, whole: bool) -> None:
        from prismoe.generate.rows import Stopped

        ready = text if whole else text.rstrip(_HALF).rstrip()
        if not whole and self._told.startswith(ready):
            ready = self._told  # the next character's first bytes hide those before them for a moment
        # What was told is the beginning, unless a part of it turned out to be a control token spelled out.
        pairs = enumerate(zip(self._told, ready, strict=False))
        same = next((place for place, (old, now) in pairs if old != now), min(len(self._told), len(ready)))
        new, self._told = ready[same:], ready
        try:
            self._on_text(new)
        except Stopped:
            self.stopped = True
            raise
