"""Conversations as token ids with the mask of what is to be learned: the assistant's tokens and its end-of-turn token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from prismoe.tune.conversations import Conversation

__all__ = ["ChatTemplate", "Rendered", "open_template", "render"]


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
    """A template and the guarded process that renders it; a context manager, reused for every conversation.

    `name`, `source` (Jinja, as it belongs into the tuned model's tokenizer), `sha256` of the source, `end_token` (id
    that closes an answer).
    """

    name: str
    source: str
    sha256: str
    end_token: int

    def __enter__(self) -> ChatTemplate:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the guarded process."""


def open_template(name: str, *, tokenizer: Any) -> ChatTemplate:
    """`model` (the tokenizer's own), a name of `prismoe.tune.templates`, or a Jinja file.

    Everything that can be wrong with the pair is found here, on a conversation of two answers.
    """
    raise NotImplementedError


def render(conversation: Conversation, template: ChatTemplate, tokenizer: Any, *, max_len: int) -> Rendered:
    """Ids and mask of one conversation, cut at the end of an answer to at most `max_len` ids.

    Raises:
        BadDocument: nothing in it that could be learned; `reason` counts it.
    """
    raise NotImplementedError
