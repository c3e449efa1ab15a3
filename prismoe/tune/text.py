"""The text side of tuning in one call: files in, rendered conversations and a receipt out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from prismoe.data.reader import BadDocument
from prismoe.errors import InputError, UsageError
from prismoe.progress import Progress, quiet
from prismoe.tune.conversations import Conversation, Refusals, find_files, read_conversations
from prismoe.tune.forms import LEFT_OUT
from prismoe.tune.render import ChatTemplate, Rendered, render_all

__all__ = ["FileReceipt", "TextReceipt", "TuneText", "is_heldout", "prepare_text"]

BATCH, BATCH_CHARACTERS = 128, 1 << 20


@dataclass
class FileReceipt:
    """Counts of one file.

    `rows` are `conversations` + `left_out` (as asked: not the preferred answer) + those `refused` by reason, with the
    `first` place of each. Of the conversations, `heldout` are held out; `unanswered` ended with a question, which was
    dropped; `truncated` were cut to fit, `cut_answers` of them within their first answer. `answers` are all that were
    read, `end_of_turn` those whose end-of-turn token is learned. Tokens count both splits.
    """

    file: str
    form: str = ""
    rows: int = 0
    conversations: int = 0
    heldout: int = 0
    left_out: int = 0
    unanswered: int = 0
    truncated: int = 0
    cut_answers: int = 0
    answers: int = 0
    end_of_turn: int = 0
    tokens: int = 0
    supervised: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens of all tokens."""
        return self.supervised / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class TextReceipt:
    """What a run learns from: the template (name, sha256 of its source), `max_len`, the split, and each file."""

    template: str
    template_sha256: str
    max_len: int
    heldout: float
    seed: int
    files: tuple[FileReceipt, ...]

    def total(self, name: str) -> int:
        """The sum of a count over all files."""
        return sum(getattr(file, name) for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        files = [{**asdict(file), "supervised_share": file.supervised_share} for file in self.files]
        return {**asdict(self), "files": files}


@dataclass(frozen=True, eq=False)
class TuneText:
    """Rendered conversations in reading order, those held out apart."""

    train: list[Rendered]
    heldout: list[Rendered]
    receipt: TextReceipt


def is_heldout(conversation: Conversation, *, share: float, seed: int) -> bool:
    """Whether a conversation is among the `share` held out: by its own hash, wherever and however often it stands."""
    drawn = sha256(f"heldout {seed} ".encode() + conversation.digest).digest()
    return int.from_bytes(drawn[:8], "big") < share * 2**64


def prepare_text(
    files: Sequence[str | Path],
    *,
    template: ChatTemplate,
    max_len: int,
    form: str = "auto",
    heldout: float = 0.02,
    seed: int = 0,
    max_refused: float = 0.01,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> TuneText:
    """Read, split and render every conversation.

    Args:
        files: paths, glob patterns and `hf://datasets/OWNER/NAME/PATTERN`.
        template: of `open_template`.
        max_len: ids of the longest conversation; longer ones are cut (see `render`).
        form: a name of `tune.forms.FORMS`, or `auto`: as the first row of each file is.
        heldout: share of the conversations that is kept from training.
        seed: draws which.
        max_refused: share of the rows that may be refused, or have nothing to learn.
        offline: only what is in the hub's cache already.
        on_progress: called with the conversations so far.

    Raises:
        UsageError: a share, a length or a form that is none; no files named, or one twice.
        InputError: a file or the template fails, too many rows are refused, or no conversation is left to train on.
    """
    if not 0 <= heldout < 1 or not 0 <= max_refused <= 1 or max_len < 2:
        raise UsageError(
            f"max_len {max_len}, heldout {heldout}, max_refused {max_refused}",
            needed="2 or more ids, and shares below 1",
        )
    train: list[Rendered] = []
    apart: list[Rendered] = []
    receipts: list[FileReceipt] = []
    refusals = Refusals()
    for path in find_files(files, offline=offline):
        receipt, own = FileReceipt(str(path)), Refusals()
        receipts.append(receipt)

        def refuse(error: BadDocument, receipt: FileReceipt = receipt, own: Refusals = own) -> None:
            receipt.rows += 1
            if error.reason == LEFT_OUT:
                receipt.left_out += 1
                return
            for kept in (own, refusals):
                kept.add(error.reason, error.where)

        for batch in _batches(read_conversations(path, form=form, on_bad=refuse)):
            for conversation, row in zip(batch, render_all(batch, template, max_len=max_len), strict=True):
                if isinstance(row, BadDocument):
                    refuse(row)
                    continue
                hold = is_heldout(conversation, share=heldout, seed=seed)
                (apart if hold else train).append(row)
                _count(receipt, conversation, row, hold)
            on_progress("conversations", len(train) + len(apart), 0)
        receipt.refused, receipt.first = dict(own.counts), own.first
    rows = sum(receipt.rows for receipt in receipts)
    refusals.check(rows, limit=max_refused)
    if not train:
        raise InputError(f"none of {rows:,} rows is left to train on", where=receipts[0].file)
    return TuneText(train, apart, TextReceipt(template.name, template.sha256, max_len, heldout, seed, tuple(receipts)))


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Some at a time, of bounded size: each is a message to the guarded process."""
    batch: list[Conversation] = []
    size = 0
    for conversation in conversations:
        batch.append(conversation)
        size += sum(len(message.content) for message in conversation.messages)
        if len(batch) == BATCH or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _count(receipt: FileReceipt, conversation: Conversation, row: Rendered, hold: bool) -> None:
    receipt.form = conversation.form
    receipt.rows += 1
    receipt.conversations += 1
    receipt.heldout += hold
    receipt.unanswered += conversation.unanswered
    receipt.truncated += row.truncated
    receipt.cut_answers += row.num_end_of_turn_supervised == 0
    receipt.answers += sum(message.role == "assistant" for message in conversation.messages)
    receipt.end_of_turn += row.num_end_of_turn_supervised
    receipt.tokens += len(row.input_ids_T)
    receipt.supervised += row.num_supervised
