"""What each expert likes: its favourite tokens, with real text around one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from prismoe.panics import read_tokenizer
from prismoe.report.favourites import Favourite, favourites
from prismoe.report.page import Block, Findings, Quote, Section, Table, Text

__all__ = ["PLACE", "section"]

PLACE = 58
MOST_EXPERTS, MOST_TOKENS = 16, 6
PLACES = ("train/model", "recovered", "moe")  # where a run keeps the tokenizer of what was traced


def section(found: Findings) -> Section | None:
    """Of a routing trace, where the tokenizer is at hand."""
    trace, tokenizer = found.trace, _tokenizer(found)
    if trace is None or tokenizer is None or not (trace.sample_tokens_GS >= 0).any():
        return None
    from prismoe.routing.metrics import mutual_information, training_domains

    count = len(trace.layers)
    clearest = int(mutual_information(trace).argmax()) if len(training_domains(trace)) > 1 else count - 1
    decode = partial(_decode, tokenizer)
    blocks: list[Block] = [
        Text(
            "Tokens of the sample that an expert gets far more often than by its load alone, the clearest first, "
            "and one of them in its text. A token is followed by how many of its occurrences the expert got.",
        )
    ]
    for layer in sorted({0, clearest, count - 1}):
        rows: list[list[str | Quote]] = []
        liked = favourites(trace, layer, most=MOST_TOKENS, decode=decode)
        for expert, found_ in enumerate(liked):
            if found_:
                words = " ".join(
                    f"{_shown(tokenizer, row)} {row.chosen}/{row.times}" + ("," if row is not found_[-1] else "")
                    for row in found_
                )
                rows.append([str(expert), words, found_[0].domain, _trimmed(found_[0].quote)])
        if rows:
            note = f", the first {MOST_EXPERTS} experts" if len(rows) > MOST_EXPERTS else ""
            caption = f"layer {trace.layers[layer]}{note}"
            heads = ["expert", "favourite tokens", "from", "in context"]
            blocks.append(Table(heads, rows[:MOST_EXPERTS], left=(1, 2, 3), caption=caption))
    return Section("tokens", "What each expert likes", blocks) if len(blocks) > 1 else None


def _tokenizer(found: Findings) -> Any:
    """The fast tokenizer of the run's models, None where there is none that can be read."""
    for place in PLACES:
        path = found.folder / place / "tokenizer.json"
        if path.is_file():
            return read_tokenizer(path)
    return None


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False)) if ids else ""


def _shown(tokenizer: Any, row: Favourite) -> str:
    """A token that can be told from others by eye."""
    piece = str(tokenizer.id_to_token(row.token))
    word = _decode(tokenizer, [row.token]).strip(" ")
    visible = (
        "".join({"\n": "⏎", "\t": "⇥", "\r": "⏎", " ": "␣", "\ufffd": "·"}.get(letter, letter) for letter in word)
        or "␣"
    )
    return f"␣{visible}" if piece[:1] in ("▁", "Ġ") and visible != "␣" else visible


def _trimmed(quote: Quote) -> Quote:
    """On one line, and a blank word made visible."""
    one: Callable[[str], str] = lambda text: text.replace("\n", " ⏎ ").replace("\t", " ")  # noqa: E731
    return Quote(f"…{one(quote.before)}", one(quote.word).replace("\ufffd", "·") or "␣", f"{one(quote.after)}…")
