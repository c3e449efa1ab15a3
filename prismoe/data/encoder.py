"""Text to ids as fast as it can be proved right: each way is held against the model's own tokenizer at start-up.

Three things make it fast. A caching encoder (fastokens, an extra) remembers the ids of words. Vocabularies without
pre-tokenisation (Llama 2), for which a whole document is one word, are cut before each run of "▁" where that cannot
change the ids: byte-pair merges only ever build entries of the vocabulary, so when no entry holds a "▁" after another
character, no merge crosses such a cut. And their byte fallback is written as a byte-level vocabulary, see `bytelevel`.
All are used only if they give exactly the ids of the `tokenizers` library for a sample of the corpus and for a list of
hostile texts.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from prismoe.data.bytelevel import ByteLevel
from prismoe.panics import told

__all__ = ["Encoder", "fastest", "plain"]

Ids = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]
"""Ids of all texts one after the other [tokens], and how many each text has [texts]."""
Encode = Callable[[Sequence[str]], Ids]

_SPACE = "▁"
_HOSTILE = (
    *("", " ", "  ", "\n", "a", " a", "a ", "  a   b  ", "\ta\t\tb\r\n\r\nc\n\n\n", "▁", "▁▁ ▁x▁"),
    *("\u00a0a\u3000b\u2003c\u2028d", "\u200b\u200d\ufeff\u00ad", "\x00\x01\x7f\x85", "\U0010ffff\ue000\ufffd"),
    *("1234567890 12,345.678 ٣٤ ½", "don't I'LL we'Ve ʼn", "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 Å", "ſK ß ẞ ǅ"),
    *("漢字かな交じり文。한국어", "ไทย", "😀👩‍👩‍👧‍👦🏳️‍🌈", "ÀÈ" * 40, "ab" * 3000, "é" * 3000, " " * 3000, "\n" * 500),
    *("<s></s><unk><|endoftext|><|im_start|> </s>x <s>", "def f(x):\n    return {x: [1, 2]}  # ok\n"),
    *("https://example.com/a?b=c&d=%20#e", "$\\frac{a}{b} \\le \\sum_{i=0}^n x_i$"),
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Encoder:
    """A way to encode. `proof` says what it was held against; empty for the tokenizer itself."""

    name: str
    proof: str
    encode: Encode


def plain(tokenizer: Any) -> Encoder:
    """The `tokenizers` library itself."""
    return Encoder(f"tokenizers {metadata.version('tokenizers')}", "", _library(tokenizer))


def fastest(file: Path, tokenizer: Any, sample: Sequence[str]) -> Encoder:
    """The fastest of the ways that give `tokenizer`'s ids for `sample` and the hostile texts, else `plain`.

    Args:
        file: tokenizer.json.
        tokenizer: read from it, set up so that marks of special tokens stay text.
        sample: some of the text that is to be encoded.
    """
    own = plain(tokenizer)
    texts = [*_HOSTILE, *sample]
    ids, lengths = own.encode(texts)
    proof = f"ids equal {own.name}'s on {len(texts)} texts, {sum(len(text.encode()) for text in texts):,} bytes"
    settings = json.loads(file.read_bytes())
    for rivals in _ways(settings, own):
        proved: list[tuple[float, Encoder]] = []
        for name, encode in rivals:
            started = time.process_time()
            try:
                with told(file):
                    found, counts = encode(texts)
            except Exception:  # noqa: BLE001 - a library that cannot do this tokenizer is not used
                continue
            seconds = time.process_time() - started
            if np.array_equal(counts, lengths) and np.array_equal(found, ids):
                proved.append((seconds, Encoder(name, proof, encode)))
        if proved:
            return min(proved, key=lambda row: row[0])[1]
    return own


def _ways(settings: dict[str, Any], own: Encoder) -> Iterator[list[tuple[str, Encode]]]:
    """Fast ways to encode, the fastest first; opened when the ones before failed, because most need only the first.

    Together in one list: those of which the vocabulary and the text decide which is faster.
    """
    cut = _cut_before_spaces(settings)
    if cut is not None:
        if (quick := _as_bytes(cut, own)) is not None:
            yield [(f"{_fastokens()}, cut before ▁, as bytes", quick)]
        rivals = [(note, _caching(described, own)) for described, note in ((cut, ", cut before ▁"), (settings, ""))]
        yield [(f"{_fastokens()}{note}", quick) for note, quick in rivals if quick is not None]
        tokenizer = Tokenizer.from_str(json.dumps(cut))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        yield [(f"{own.name}, cut before ▁", _library(tokenizer))]
    elif (quick := _caching(settings, own)) is not None:
        yield [(_fastokens(), quick)]


def _as_bytes(settings: dict[str, Any], own: Encoder) -> Encode | None:
    spelled = ByteLevel.of(settings)
    encode = _caching(spelled.settings, own) if spelled is not None else None
    return (lambda texts: spelled.expand(*encode(texts))) if spelled is not None and encode is not None else None


def _fastokens() -> str:
    return f"fastokens {metadata.version('fastokens')}"


def _cut_before_spaces(settings: dict[str, Any]) -> dict[str, Any] | None:
    """tokenizer.json with a split before each run of ▁, None where that could change an id."""
    model = settings.get("model") or {}
    vocabulary = model.get("vocab") or {}
    crossing = re.compile(f"[^{_SPACE}]{_SPACE}")
    if (
        model.get("type") != "BPE"
        or settings.get("pre_tokenizer") is not None
        or _SPACE not in vocabulary
        or any(
            model.get(key) for key in ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        )
        or any(crossing.search(token) for token in vocabulary)
    ):
        return None
    split = {"type": "Split", "pattern": {"Regex": f"{_SPACE}+"}, "behavior": "MergedWithNext", "invert": False}
    return {**settings, "pre_tokenizer": split}


def _library(tokenizer: Any) -> Encode:
    def encode(texts: Sequence[str]) -> Ids:
        found = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        ids = [np.array(part, np.uint32) for part in found]
        return np.concatenate(ids or [np.empty(0, np.uint32)]), np.array([len(part) for part in found], np.int64)

    return encode


def _caching(settings: dict[str, Any], own: Encoder) -> Encode | None:
    try:
        import fastokens
    except ImportError:
        return None
    try:
        needed = {**settings, "decoder": None, "post_processor": None}  # more is supported without
        tokenizer = fastokens.Tokenizer.from_json_str(json.dumps(needed))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    except Exception:  # noqa: BLE001 - see `fastest`
        return None

    def encode(texts: Sequence[str]) -> Ids:
        try:
            ids, offsets = tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        except Exception:  # noqa: BLE001 - a limit of its matcher: the tokenizer itself has none
            return own.encode(texts)
        ends: npt.NDArray[np.int64] = np.frombuffer(offsets, "<u8").astype(np.int64)
        return np.frombuffer(ids, "<u4"), ends[1:] - ends[:-1]

    return encode
