"""The model's own fast tokenizer, read from `tokenizer.json`, for turning documents into ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.data.encoder import Encoder, fastest, plain
from prismoe.errors import InputError
from prismoe.folder import sha256_file
from prismoe.panics import read_tokenizer, told
from prismoe.strictjson import read_json

__all__ = ["DocumentTokenizer"]


@dataclass(frozen=True, eq=False)
class DocumentTokenizer:
    """Ids of whole documents: the tokenizer's own start token where its template has one, the text, the end token.

    Marks of special tokens inside a text (a web page that shows `</s>`) stay text: a document cannot end itself.
    """

    sha256: str
    vocab_size: int
    start_token: int | None
    end_token: int
    unknown_token: int | None
    encoder: Encoder
    _tokenizer: Any
    _file: Path

    @classmethod
    def open(cls, source: str | Path, *, add_special_tokens: bool = True) -> DocumentTokenizer:
        """Read a folder with `tokenizer.json` (a model's), or such a file.

        The end token is `eos_token` of tokenizer_config.json or special_tokens_map.json, else `eos_token_id` of
        config.json; the vocabulary's size is config.json's where there is one.

        Raises:
            InputError: no readable fast tokenizer, or none of these names an end token it knows.
        """
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise InputError(
                "no tokenizer.json", where=str(source), hint="save the fast tokenizer beside the model's config.json"
            )
        with told(path):
            tokenizer = read_tokenizer(path)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            tokenizer.encode_special_tokens = True
        names = {
            **_object(path.with_name("special_tokens_map.json")),
            **_object(path.with_name("tokenizer_config.json")),
        }
        config = _object(path.with_name("config.json"))
        with told(path):
            end_token = _special(tokenizer, names, config, "eos")
            unknown_token = _special(tokenizer, names, {}, "unk")
            known = tokenizer.get_vocab_size()
        if end_token is None:
            raise InputError(
                "no end token that the tokenizer knows",
                where=str(path),
                needed="eos_token in tokenizer_config.json beside it, or eos_token_id in config.json",
            )
        with told(path):
            start_token = _start(tokenizer, end_token, str(path)) if add_special_tokens else None
        vocab_size = config.get("vocab_size")
        return cls(
            sha256=sha256_file(path),
            vocab_size=vocab_size if type(vocab_size) is int and 0 < vocab_size <= 1 << 32 else known,
            start_token=start_token,
            end_token=end_token,
            unknown_token=unknown_token,
            encoder=plain(tokenizer),
            _tokenizer=tokenizer,
            _file=path,
        )

    def quicker(self, sample: Sequence[str]) -> DocumentTokenizer:
        """The same with the fastest installed encoder that gives the same ids for `sample` and for hostile text."""
        with told(self._file):
            return replace(self, encoder=fastest(self._file, self._tokenizer, sample))

    def encode(self, documents: Sequence[str]) -> list[npt.NDArray[np.int64]]:
        """Ids of each document. Runs on all cores; the result does not depend on how many."""
        ids, ends = self.encode_flat(documents)
        return [part.astype(np.int64) for part in np.split(ids, ends[:-1])] if len(ends) else []

    def encode_flat(self, documents: Sequence[str]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all documents one after the other, uint32 [tokens], and where each ends, int64 [documents]."""
        with told(self._file):
            ids, lengths = self.encoder.encode(documents)
        lengths = lengths + (1 if self.start_token is None else 2)
        ends = np.cumsum(lengths)
        found = np.empty(int(ends[-1]) if len(ends) else 0, np.uint32)
        of_text = np.ones(len(found), np.bool_)
        of_text[ends - 1] = False
        found[ends - 1] = self.end_token
        if self.start_token is not None:
            of_text[ends - lengths] = False
            found[ends - lengths] = self.start_token
        found[of_text] = ids
        return found, ends


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _special(tokenizer: Any, names: dict[str, Any], config: dict[str, Any], role: str) -> int | None:
    """Id of the `eos` or `unk` token: by name where there is one, else by id (the first of several)."""
    name = names.get(f"{role}_token")
    name = name.get("content") if isinstance(name, dict) else name
    if isinstance(name, str):
        found: int | None = tokenizer.token_to_id(name)
        return found
    number = config.get(f"{role}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    if type(number) is not int or not 0 <= number < 1 << 32 or tokenizer.id_to_token(number) is None:
        return None
    return number


def _start(tokenizer: Any, end_token: int, where: str) -> int | None:
    """The id that the tokenizer's own template puts before a text; what it puts after is the end token or nothing."""
    template = [number for number in tokenizer.encode("", add_special_tokens=True).ids if number != end_token]
    if len(template) > 1:
        raise InputError(
            f"the template adds {len(template)} ids to a text", where=where, needed="at most a start token"
        )
    return template[0] if template else None
