"""Answers to a file of prompts, as JSON lines; a stopped job goes on where it was and gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prismoe.errors import ResourceError, UsageError
from prismoe.folder import versions, write_atomic
from prismoe.generate.prompts import Prompt
from prismoe.generate.sampling import Sampling
from prismoe.generate.speaker import Speaker
from prismoe.lock import hold_file
from prismoe.progress import Progress, quiet
from prismoe.room import unwritten

__all__ = ["Answered", "answer_file", "answer_prompts"]


@dataclass(frozen=True)
class Answered:
    """`rows` written to `out`, of which `resumed` were there from before; `ended` of them by the model itself, the
    others at the limit. `tokens` were written by this command, `tokens_per_second` of them.
    """

    out: str
    rows: int
    resumed: int
    ended: int
    tokens: int
    tokens_per_second: float | None
    samples: tuple[dict[str, Any], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def answer_prompts(
    speaker: Speaker, prompts: Sequence[Prompt], *, sampling: Sampling, batch_size: int, on_progress: Progress = quiet
) -> list[dict[str, Any]]:
    """The rows of `answer_file`, in memory."""
    ids = _checked(speaker, prompts, sampling)
    rows: list[dict[str, Any]] = []
    for first in range(0, len(prompts), batch_size):
        on_progress("prompts", first, len(prompts))
        rows += _batch(speaker, prompts[first : first + batch_size], ids[first : first + batch_size], sampling)
    return rows


def answer_file(
    speaker: Speaker,
    prompts: Sequence[Prompt],
    *,
    out: Path,
    sampling: Sampling,
    batch_size: int = 8,
    force: bool = False,
    on_progress: Progress = quiet,
) -> Answered:
    """Answer every prompt and write one JSON object a line: the prompt (or messages) with its `line`, `text`, the
    number of `tokens`, and `finish`: "end" of the model's own or "length".

    Batches are the same whether a job was stopped or not, because rounding depends on what is computed together. Until
    the end rows are in `OUT.partial`, whose first line says which job they belong to.

    Raises:
        UsageError: a prompt without tokens or beyond the model's context; nothing has been written then.
        ResourceError: `out` is there already (unless `force`), `OUT.partial` is another job's, or another process is
            at it.
        InputError: the template refuses a prompt, or the model cannot be loaded.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size {batch_size}", needed="at least 1")
    if out.exists() and not force:
        raise ResourceError("is there already", where=str(out), hint="--force replaces it")
    ids = _checked(speaker, prompts, sampling)
    key = _key(speaker, prompts, sampling, batch_size)
    partial = out.with_name(out.name + ".partial")
    with hold_file(out):
        lines = _continued(partial, key, batch_size, force=force)
        resumed, tokens, began = len(lines), 0, time.monotonic()
        try:
            write_atomic(partial, b"".join([json.dumps({"job": key}).encode() + b"\n", *lines]))
            with partial.open("ab") as file:
                for first in range(resumed, len(prompts), batch_size):
                    on_progress("prompts", first, len(prompts))
                    part = slice(first, first + batch_size)
                    rows = _batch(speaker, prompts[part], ids[part], sampling)
                    made = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]
                    tokens += sum(row["tokens"] for row in rows)
                    file.write(b"".join(made))
                    file.flush()
                    os.fsync(file.fileno())
                    lines += made
        except OSError as error:
            raise unwritten(partial, error) from error
        seconds = time.monotonic() - began
        write_atomic(out, b"".join(lines))
        partial.unlink()
    on_progress("prompts", len(prompts), len(prompts))
    ended = sum(json.loads(line)["finish"] == "end" for line in lines)
    return Answered(str(out), len(lines), resumed, ended, tokens, tokens / seconds if tokens else None)


def _checked(speaker: Speaker, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    """Ids of all prompts, each of which leaves room for an answer."""
    found = []
    for prompt in prompts:
        ids = prompt.ids(speaker)
        if speaker.room(ids, sampling) < 1:
            found_ids = f"a prompt of {len(ids):,} ids"
            raise UsageError(found_ids, where=prompt.where, needed=f"fewer than the model's {speaker.context:,}")
        found.append(ids)
    return found


def _batch(
    speaker: Speaker, prompts: Sequence[Prompt], ids: Sequence[list[int]], sampling: Sampling
) -> list[dict[str, Any]]:
    said = speaker.speak([(one, sampling) for one in ids])
    return [
        {
            **({"line": prompt.line} if prompt.line else {}),
            **prompt.to_dict(),
            "text": speech.text,
            "tokens": len(speech.ids),
            "finish": "end" if speech.ended else "length",
        }
        for prompt, speech in zip(prompts, said, strict=True)
    ]


def _key(speaker: Speaker, prompts: Sequence[Prompt], sampling: Sampling, batch_size: int) -> str:
    asked = hashlib.sha256("".join(json.dumps([row.line, row.to_dict()]) + "\n" for row in prompts).encode())
    facts = {
        "model": speaker.checkpoint.fingerprint,
        "template": speaker.template.sha256 if speaker.template is not None else None,
        "prompts": asked.hexdigest(),
        "sampling": asdict(sampling),
        "batch_size": batch_size,
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _continued(partial: Path, key: str, batch_size: int, *, force: bool) -> list[bytes]:
    """Lines of whole batches that a stopped job has left."""
    if force or not partial.is_file():
        return []
    head, *lines = partial.read_bytes().split(b"\n")
    if head != json.dumps({"job": key}).encode():
        raise ResourceError("holds a different job", where=str(partial), hint="--force replaces it")
    whole = lines[:-1]  # what follows the last newline was cut off while it was written
    return [line + b"\n" for line in whole[: len(whole) // batch_size * batch_size]]
