"""The token ids that `verify` sends through the layers: real text where the folder has a fast tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from prismoe.errors import InputError
from prismoe.panics import read_tokenizer, told

__all__ = ["sample_ids"]

# Written for this purpose: plain prose, numbers, code and a list, so that routers see more than one kind of text.
TEXT = """\
A prism takes one beam of white light and splits it into many. Nothing is added on the way: every colour that leaves \
the glass was already in the beam, and a second prism, turned around, puts the beam together again. On 14 March the \
class measured the angle three times and found 41.2, 41.6 and 41.3 degrees; the teacher wrote the mean on the board.

def mean(values):
    total = 0.0
    for value in values:
        total += value
    return total / len(values)

"Why is blue bent more than red?" asked Mara. "Because the glass slows it more," said her brother, who had read it \
somewhere and was not quite sure. They carried the lamp outside, waited for the dark, and tried again with water, \
salt and an old jam jar: (1) fill the jar, (2) tilt the mirror, (3) look at the wall.
"""


def sample_ids(folder: Path, *, num_tokens: int, vocab_size: int) -> tuple[npt.NDArray[np.int64], str]:
    """At most `num_tokens` ids and where they came from: `tokenizer.json` on our text, else seeded random ids.

    Raises:
        InputError: tokenizer.json cannot be read, or gives ids outside the vocabulary.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        ids = np.random.Generator(np.random.Philox(0)).integers(0, vocab_size, num_tokens)
        return ids.astype(np.int64), "seeded random ids (no tokenizer.json)"
    with told(path):
        encoded = read_tokenizer(path).encode(TEXT).ids
    ids = np.array(encoded[:num_tokens], dtype=np.int64)
    if ids.size == 0 or ids.max() >= vocab_size:
        raise InputError(
            f"tokenizer gives id {ids.max() if ids.size else 'none'}", where=str(path), needed=f"ids below {vocab_size}"
        )
    return ids, "text of prismoe/verify/sample.py through tokenizer.json"
