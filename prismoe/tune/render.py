"""Conversations as token ids with the mask of what is learned: the answers' tokens and the end-of-turn tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe import registry
from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, UsageError
from prismoe.panics import told
from prismoe.tune.conversations import Conversation, Message
from prismoe.tune.guard import Guard, Shown

__all__ = ["TEMPLATES", "ChatTemplate", "Rendered", "open_template", "render", "render_all"]

Encoded = tuple[npt.NDArray[np.int32], list[tuple[int, int]]]
"""Ids [T], and the tokens (begin, end) of each answer, the end-of-turn token last."""
TEMPLATES = "prismoe.tune.templates"
MAX_TEMPLATE = 1 << 20  # bytes; the longest published ones have some 10^4
_PROBE = (
    Message("user", "Zig 1?"),
    Message("assistant", "Zag 1."),
    Message("user", "Zig 2?"),
    Message("assistant", "Zag 2."),
)


@dataclass(frozen=True, eq=False)
class Rendered:
    """One conversation as a model reads it.

    `supervised_T[t]` says that token t is to be predicted (labels are ids there and -100 elsewhere, at the position of
    their token: stock models shift). `truncated` where turns were cut to fit.
    """

    input_ids_T: npt.NDArray[np.int32]
    supervised_T: npt.NDArray[np.bool_]
    truncated: bool
    num_end_of_turn_supervised: int
    file: str = ""
    line: int = 0

    @property
    def num_supervised(self) -> int:
        """Tokens to be learned."""
        return int(self.supervised_T.sum())


class ChatTemplate:
    """A template bound to a tokenizer, with the guarded process that renders it; a context manager.

    `name`; `source`, the Jinja that belongs into the tuned model's tokenizer; `sha256` of that; `marks`, whether it
    says itself what is the assistant's; `end_token`, the id that closes an answer; `starts`, whether it writes the
    tokenizer's start token. Use `open_template`.
    """

    def __init__(self, name: str, source: str, tokenizer: Any) -> None:
        from tokenizers import Tokenizer, processors

        self.name, self.source, self.where = name, source, _where(name, tokenizer)
        self.sha256 = sha256(source.encode()).hexdigest()
        added = tokenizer.added_tokens_decoder
        control = {token.content for token in added.values() if token.special}
        self._control = re.compile(
            "|".join(re.escape(token) for token in sorted(control, key=len, reverse=True)) or "(?!)"
        )
        # A copy that knows exactly which characters a token stands for: the byte level's trims spaces off its offsets,
        # and a start token is the template's to write.
        with told(self.where):
            self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        variables = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        self.guard = Guard(source, variables=variables, where=self.where)
        try:
            self.marks = self.guard.marks
            self.end_token, self.starts = self._probe(
                frozenset(added) - {tokenizer.unk_token_id}, tokenizer.bos_token_id
            )
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the guarded process."""
        self.guard.close()

    def prompt(self, messages: Sequence[Message], *, where: str = "") -> npt.NDArray[np.int32]:
        """Ids of a conversation up to where the assistant's next answer begins.

        Raises:
            BadDocument: the template refuses it, or a message holds a control token.
        """
        if error := self._control_token(messages, where):
            raise error
        shown = self.guard.render(messages, prompt=True, where=where)
        return np.asarray(self._encode([shown.text])[0].ids, np.int32)

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        with told(self.where):
            return list(self._tokenizer.encode_batch(list(texts), add_special_tokens=False))

    def _probe(self, added: frozenset[int], start_token: int | None) -> tuple[int, bool]:
        """The end-of-turn token and whether there is a start token, seen on a conversation of two answers."""
        where = self.where
        try:
            shown = self.guard.render(_PROBE)
            if error := self._unmarked(shown, _PROBE, ""):
                raise error
        except BadDocument as error:
            raise InputError(error.found, where=where) from error
        ids_T, offsets_T2 = _arrays(self._encode([shown.text])[0])
        starts = [int(number) == start_token for number in ids_T[:2]]
        if all(starts):
            raise InputError("writes the start token twice", where=where)
        ends = set()
        for span in shown.spans:
            inside = np.flatnonzero(_overlaps(offsets_T2, span))
            last = next((t for t in inside[::-1] if int(ids_T[t]) in added or _text(shown, offsets_T2[t]).strip()), -1)
            ends.add(int(ids_T[last]) if last >= 0 else -1)
        if len(ends) != 1 or not ends <= added:
            raise InputError(
                "an answer does not end with a token of its own",
                where=where,
                needed="an end-of-turn token that the tokenizer knows, as the last thing of each answer",
                hint="" if not self.marks else "the end token belongs before {% endgeneration %}",
            )
        return ends.pop(), starts[0]

    def _unmarked(self, shown: Shown, messages: Sequence[Message], where: str) -> BadDocument | None:
        answers = sum(message.role == "assistant" for message in messages)
        if len(shown.spans) == answers:
            return None
        found = f"the template marks {len(shown.spans)} of {answers} answers"
        return BadDocument(found, reason="answers not told from the rest", where=where)

    def _control_token(self, messages: Sequence[Message], where: str) -> BadDocument | None:
        for turn, message in enumerate(messages, start=1):
            if found := self._control.search(message.content):
                return BadDocument(
                    f"turn {turn} holds the control token {found[0]}", reason="control token in the text", where=where
                )
        return None

    def encode(self, batch: Sequence[Conversation]) -> Iterator[Encoded | BadDocument]:
        """Ids of whole conversations, each text tokenised once, and the tokens of their answers.

        A conversation that the template refuses, or that holds a control token, gives what is wrong with it.
        """
        refused = [self._control_token(conversation.messages, conversation.where) for conversation in batch]
        rest = [conversation for conversation, error in zip(batch, refused, strict=True) if error is None]
        shown = list(self.guard.render_all([(conversation.messages, conversation.where) for conversation in rest]))
        texts = [one.text for one in shown if isinstance(one, Shown)]
        encodings = iter(self._encode(texts))
        found = iter(zip(rest, shown, strict=True))
        for error in refused:
            if error is not None:
                yield error
                continue
            conversation, one = next(found)
            yield one if isinstance(one, BadDocument) else self._located(conversation, one, next(encodings))

    def _located(self, conversation: Conversation, shown: Shown, encoding: Any) -> Encoded | BadDocument:
        if error := self._unmarked(shown, conversation.messages, conversation.where):
            return error
        ids_T, offsets_T2 = _arrays(encoding)
        answers = []
        for span in shown.spans:
            inside = np.flatnonzero(_overlaps(offsets_T2, span))
            ends = inside[ids_T[inside] == self.end_token]
            if not len(ends):
                return BadDocument("an answer without its end token", reason="no end token", where=conversation.where)
            answers.append((int(inside[0]), int(ends[-1]) + 1))
        return ids_T, answers


def _arrays(encoding: Any) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Ids [T] and the characters [T, 2] that each stands for."""
    return np.asarray(encoding.ids, np.int32), np.asarray(encoding.offsets, np.int64).reshape(-1, 2)


def _overlaps(offsets_T2: npt.NDArray[np.int64], span: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Tokens [T] that stand for any character of the span; one that stands for none belongs to what follows it."""
    begin_T, end_T = offsets_T2[:, 0], offsets_T2[:, 1]
    found: npt.NDArray[np.bool_] = (begin_T < span[1]) & (
        (end_T > span[0]) | ((begin_T == end_T) & (begin_T >= span[0]))
    )
    return found


def _text(shown: Shown, offsets: npt.NDArray[np.int64]) -> str:
    return shown.text[int(offsets[0]) : int(offsets[1])]


def _where(name: str, tokenizer: Any) -> str:
    """What errors name."""
    return f"template model of {tokenizer.name_or_path}" if name == "model" else f"template {name}"


def open_template(name: str, *, tokenizer: Any) -> ChatTemplate:
    """`model` (the tokenizer's own), a name of `prismoe.tune.templates`, or a Jinja file.

    Everything that can be wrong with the pair is found here, on a conversation of two answers.

    Args:
        name: which template.
        tokenizer: a stock fast tokenizer (`PreTrainedTokenizerFast`).

    Raises:
        UsageError: an unknown name.
        InputError: no such template, a tokenizer without an end token or without one that the template writes, a
            template that is no Jinja, breaks a limit, or whose answers and their ends cannot be told from the rest.
    """
    where = _where(name, tokenizer)
    with told(where):  # the stock class looks up its special tokens as they are asked for
        return _open(name, tokenizer, where)


def _open(name: str, tokenizer: Any, where: str) -> ChatTemplate:
    end = tokenizer.eos_token
    if end is None or tokenizer.backend_tokenizer.token_to_id(end) is None:
        raise InputError(
            "a tokenizer without an end token", where=where, needed="eos_token in tokenizer_config.json, known to it"
        )
    if name == "model":
        own = tokenizer.chat_template
        source = own.get("default") if isinstance(own, dict) else own
        if not isinstance(source, str):
            known = ", ".join(registry.names(TEMPLATES))
            raise InputError("the tokenizer has no chat template", where=where, hint=f"name one of {known}, or a file")
        return ChatTemplate(name, source, tokenizer)
    if "/" in name or "." in name:
        return ChatTemplate(name, _read(Path(name).expanduser()), tokenizer)
    module = registry.load(TEMPLATES, name, where="template")
    for token in module.TOKENS:
        if tokenizer.backend_tokenizer.token_to_id(token) not in tokenizer.added_tokens_decoder:
            raise InputError(
                f"the tokenizer has no token {token}",
                where=where,
                hint="vicuna_v1_1 needs no token beside the end token",
            )
    starts = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ChatTemplate(name, ("{{ bos_token }}" if starts else "") + module.TEMPLATE, tokenizer)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE:
            raise InputError(f"a template over {MAX_TEMPLATE >> 20} MiB", where=str(path))
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            "no such template",
            where=str(path),
            needed="a Jinja file, model, or one of " + ", ".join(registry.names(TEMPLATES)),
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read ({error})", where=str(path)) from error


def render(conversation: Conversation, template: ChatTemplate, *, max_len: int) -> Rendered:
    """Ids and mask of one conversation, at most `max_len` ids.

    A longer one is cut after the last answer that ends within; where not even the first does, within that answer.

    Raises:
        BadDocument: nothing in it that could be learned; `reason` counts it.
        InputError: the template broke a limit.
    """
    (found,) = render_all([conversation], template, max_len=max_len)
    if isinstance(found, BadDocument):
        raise found
    return found


def render_all(
    batch: Sequence[Conversation], template: ChatTemplate, *, max_len: int
) -> Iterator[Rendered | BadDocument]:
    """Each conversation as `render` gives it, or what is wrong with it in its place; on all cores."""
    for conversation, encoded in zip(batch, template.encode(batch), strict=True):
        yield encoded if isinstance(encoded, BadDocument) else _cut(conversation, *encoded, max_len=max_len)


def _cut(
    conversation: Conversation, ids_T: npt.NDArray[np.int32], answers: list[tuple[int, int]], *, max_len: int
) -> Rendered | BadDocument:
    length = len(ids_T)
    if length > max_len:
        length = max((end for _, end in answers if end <= max_len), default=max_len)
    supervised_T = np.zeros(length, np.bool_)
    for begin, end in answers:
        supervised_T[begin:end] = True
    if not supervised_T.any():
        return BadDocument(
            f"the first answer begins after {answers[0][0]:,} ids, beyond the {max_len:,} that fit",
            reason="nothing supervised",
            where=conversation.where,
        )
    return Rendered(
        input_ids_T=ids_T[:length].copy(),
        supervised_T=supervised_T,
        truncated=length < len(ids_T),
        num_end_of_turn_supervised=sum(end <= length for _, end in answers),
        file=conversation.file,
        line=conversation.line,
    )
