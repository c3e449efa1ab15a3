"""A SentencePiece-style vocabulary with byte fallback (Llama 2's kind) written as a byte-level one.

Caching encoders have their fast path for byte-level vocabularies. The two kinds give the same ids when the bytes of
each character are merged before anything else: those merges rank first, and UTF-8 is self-synchronising, so they build
exactly the characters. A character that the vocabulary lacks stops at its bytes, whose ids are those of `<0xE2>`, or
at a beginning that it shares with a known character; such a beginning gets an id behind the vocabulary, which `expand`
turns back into bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ByteLevel"]

_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_SHOWN = {byte: chr(byte) for byte in _PRINTED}  # how byte-level vocabularies write bytes
_SHOWN |= {byte: chr(256 + n) for n, byte in enumerate(byte for byte in range(256) if byte not in _SHOWN)}
_NO_BYTES = "\ue000"  # written by no byte: begins the names of entries that no text may become


class ByteLevel:
    """`settings` is the new tokenizer.json; ids that it gives go through `expand`."""

    def __init__(self, settings: dict[str, Any], size: int, beginnings: list[list[int]]) -> None:
        self.settings, self._size = settings, size
        self._widths = np.array([len(ids) for ids in beginnings], np.int64)
        self._beginnings = [np.array(ids, np.uint32) for ids in beginnings]

    @classmethod
    def of(cls, settings: dict[str, Any]) -> ByteLevel | None:
        """Of a tokenizer.json whose pre-tokeniser only splits; None where it could not be the same."""
        model, split = settings["model"], settings["pre_tokenizer"]
        vocabulary: dict[str, int] = model["vocab"]
        marks = [f"<0x{byte:02X}>" for byte in range(256)]
        merges = [tuple(merge if isinstance(merge, list) else merge.split(" ")) for merge in model["merges"]]
        apart = {*marks} | {token["content"] for token in settings["added_tokens"]}
        if (
            not model.get("byte_fallback")
            or any(mark not in vocabulary for mark in marks)
            or not all(token["special"] for token in settings["added_tokens"])
            or any(part in apart or part not in vocabulary for a, b in merges for part in (a, b, a + b))
        ):
            return None
        fallback = [vocabulary[mark] for mark in marks]
        names = {_SHOWN[byte]: fallback[byte] for byte in range(256)}
        size = max(vocabulary.values()) + 1
        first: dict[tuple[str, str], None] = {}  # in order, each once
        beginnings: list[list[int]] = []
        for token in sorted(token for token in vocabulary if len(token) == 1 and token not in apart):
            name = _written(token)
            for end in range(2, len(name)):
                if name[:end] not in names:
                    names[name[:end]] = size + len(beginnings)
                    beginnings.append([fallback[byte] for byte in token.encode()[:end]])
            names[name] = vocabulary[token]
            first |= {(name[: end - 1], name[end - 1]): None for end in range(2, len(name) + 1)}
        names |= {_written(token): number for token, number in vocabulary.items() if token not in apart}
        unused = set(range(size)) - set(names.values())
        names |= {f"{_NO_BYTES}{number}": number for number in unused}  # libraries expect ids without gaps
        to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        described = {
            **settings,
            "added_tokens": [],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
            "model": {
                **model,
                "unk_token": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "vocab": names,
                "merges": [*map(list, first), *([_written(a), _written(b)] for a, b in merges)],
            },
        }
        return cls(described, size, beginnings)

    def expand(
        self, ids: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """Ids of all texts, one after the other, and how many each has: with beginnings of characters as bytes."""
        over = ids >= self._size
        if not over.any():
            return ids, lengths
        numbers = ids[over] - self._size
        widths = np.ones(len(ids), np.int64)
        widths[over] = self._widths[numbers]
        found = np.repeat(ids, widths)
        found[np.repeat(over, widths)] = np.concatenate([self._beginnings[number] for number in numbers])
        running = np.concatenate([[0], np.cumsum(widths)])
        ends = np.cumsum(lengths)
        return found, running[ends] - running[ends - lengths]


def _written(text: str) -> str:
    return "".join(_SHOWN[byte] for byte in text.encode())
