"""What a batch is made of: rendered conversations, one a row or several packed, counted before anything runs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError
from prismoe.folder import sha256_file
from prismoe.panics import read_tokenizer, told
from prismoe.progress import Progress
from prismoe.tune.conversations import find_files
from prismoe.tune.render import open_template
from prismoe.tune.settings import TuneConfig
from prismoe.tune.text import TuneText, prepare_text

__all__ = ["Rows", "open_tokenizer", "read_rows"]

TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True, eq=False)
class Rows:
    """Attributes:
    text: the conversations, those held out apart, and their counts.
    parents: fingerprints of the files and of the template.
    files: what the tuned folder has to hold beside the source's: the template that it was tuned with.
    """

    text: TuneText
    config: TuneConfig
    parents: dict[str, str]
    files: dict[str, bytes]
    template_sha256: str

    @cached_property
    def dataset(self) -> Any:
        """Columns `input_ids` and `labels`, and `seq_lengths` where rows are packed."""
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
        from trl import pack_dataset

        ids = [row.input_ids_T.astype(np.int64) for row in self.text.train]
        labels = [np.where(row.supervised_T, row_T, -100) for row, row_T in zip(self.text.train, ids, strict=True)]
        dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
        if not self.config.packing:
            return dataset
        before = is_progress_bar_enabled()
        disable_progress_bar()
        try:
            return pack_dataset(dataset, self.config.seq_len, "bfd", {"load_from_cache_file": False})
        finally:
            if before:
                enable_progress_bar()

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return len(self.dataset)

    @property
    def steps(self) -> int:
        """Updates of the whole run, as the Trainer counts them: the last batch of an epoch may be a smaller one."""
        micro_batches = -(-self.count // self.config.micro_batch_size)
        return self.config.epochs * -(-micro_batches // (self.config.batch_size // self.config.micro_batch_size))

    @cached_property
    def tokens(self) -> int:
        """Ids of an epoch."""
        return sum(len(row.input_ids_T) for row in self.text.train)

    @cached_property
    def supervised(self) -> int:
        """Of these the ones to be learned: nobody can predict the first of a conversation."""
        return sum(int(row.supervised_T[1:].sum()) for row in self.text.train)


def open_tokenizer(checkpoint: Checkpoint) -> Any:
    """The fast tokenizer of the folder as the stock class, with no code of the folder run."""
    from transformers import PreTrainedTokenizerFast

    folder = checkpoint.folder
    if not (folder / "tokenizer.json").is_file():
        raise InputError(
            "no tokenizer.json", where=str(folder), hint="save the fast tokenizer beside the model's config.json"
        )
    read_tokenizer(folder / "tokenizer.json")
    with told(folder):
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def read_rows(
    config: TuneConfig, checkpoint: Checkpoint, tokenizer: Any, *, offline: bool, on_progress: Progress
) -> Rows:
    """Read and render all conversations.

    Raises:
        InputError: too many rows that are none, nothing to learn, no end of turn among it, or nothing held out.
    """
    files = find_files(config.data, offline=offline)
    with open_template(config.template, tokenizer=tokenizer) as template:
        text = prepare_text(
            files,
            template=template,
            max_len=config.seq_len,
            form=config.form,
            heldout=config.heldout,
            seed=config.seed,
            max_refused=config.max_refused,
            offline=offline,
            on_progress=on_progress,
        )
        source, fingerprint = template.source, template.sha256
    rows = Rows(
        text=text,
        config=config,
        parents={**{f"data {number}": sha256_file(file) for number, file in enumerate(files)}, "template": fingerprint},
        files={} if config.template == "model" else _tokenizer_files(checkpoint, source),
        template_sha256=fingerprint,
    )
    _check(rows, ", ".join(str(file) for file in files))
    return rows


def _check(rows: Rows, where: str) -> None:
    """Nothing that is to be learned got lost on the way, and there is something."""
    if not rows.text.train:
        raise InputError("no conversation to learn from", where=where, hint="a smaller tune.heldout")
    if not rows.text.heldout:
        raise InputError("no conversation is held out", where=where, hint="a larger tune.heldout, or more of them")
    if not rows.supervised:
        raise InputError("nothing is supervised: all labels are masked", where=where, hint="see tune.template")
    if not sum(row.num_end_of_turn_supervised for row in rows.text.train):
        raise InputError(
            "no end of turn is supervised: the model would never learn to stop",
            where=where,
            needed="a template that marks the end token as part of the answer",
        )


def check_dataset(rows: Rows) -> None:
    """Packing lost no token that is to be learned."""
    found = sum(
        int((np.asarray(row["labels"]) != -100).sum()) for row in rows.dataset.with_format("numpy", columns=["labels"])
    )
    needed = sum(row.num_supervised for row in rows.text.train)
    assert found == needed, f"{found} supervised tokens after packing, {needed} before"


def _tokenizer_files(checkpoint: Checkpoint, source: str) -> dict[str, bytes]:
    """The template as a file of its own, which readers prefer; one in tokenizer_config.json would say another thing."""
    files = {TEMPLATE: source.encode()}
    path = checkpoint.folder / "tokenizer_config.json"
    if path.is_file():
        settings = json.loads(path.read_bytes())
        if "chat_template" in settings:
            settings["chat_template"] = source
            files[path.name] = (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
    return files
