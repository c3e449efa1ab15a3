"""A conversation, real tokenizers and what of a rendered row is learned, for tests of tuning."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from prismoe.tune.conversations import Conversation, Message
from prismoe.tune.render import Rendered

TURNS = (
    Message("user", "hi"),
    Message("assistant", "Once upon a time"),
    Message("user", "x"),
    Message("assistant", "y"),
)
SYSTEM = Message("system", "Be.")
TALK = Conversation(TURNS, "talk.jsonl", 3)
CHATML = ["<|im_start|>", "<|im_end|>"]


def unmarked(source: str) -> str:
    return re.sub(r"{% (end)?generation %}", "", source)


def stories(shared: Path, **more: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(shared / "models" / "stories260K", **more)


def neox(shared: Path) -> PreTrainedTokenizerFast:
    """GPT-NeoX's, which writes no start token and whose start is its end."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(shared / "models" / "gpt-neox-tokenizer" / "tokenizer.json"), eos_token=end, bos_token=end
    )


@cache
def llama2(shared: Path) -> PreTrainedTokenizerFast:
    """Llama-2's vocabulary out of its SentencePiece file, in which lengths of a piece fit into one byte."""
    data = (shared / "models" / "llama2-tokenizer" / "tokenizer.model").read_bytes()
    scores: dict[str, float] = {}
    position = 0
    while data[position] == 0x0A:  # field 1: a piece, of text, score and perhaps a type
        size = data[position + 1]
        piece = data[position + 2 : position + 2 + size]
        text, rest = piece[2 : 2 + piece[1]], piece[2 + piece[1] :]
        scores[text.decode()] = float(np.frombuffer(rest[1:5], "<f4")[0])
        position += 2 + size
    ids = {text: number for number, text in enumerate(scores)}
    merges = [
        (ids[left + right], left, right)
        for text in ids
        for left, right in ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        if left in ids and right in ids
    ]
    model = models.BPE(
        ids, [(left, right) for _, left, right in sorted(merges)], unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    assert len(scores) == 32000
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", add_bos_token=True
    )


def parts(row: Rendered, tokenizer: PreTrainedTokenizerFast) -> list[tuple[bool, str]]:
    """Runs of tokens that are supervised or not."""
    cuts = np.flatnonzero(np.diff(row.supervised_T)) + 1
    runs = [" ".join(tokenizer.convert_ids_to_tokens(run.tolist())) for run in np.split(row.input_ids_T, cuts)]
    return list(zip(row.supervised_T[[0, *cuts]].tolist(), runs, strict=True))
