"""`trace`: forward hooks on the stock routers of a mixture while it reads held-out text of each domain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain
from prismoe.data.tokenizer import DocumentTokenizer
from prismoe.errors import InputError, NumericalError, UsageError
from prismoe.folder import MANIFEST, sha256_file, versions
from prismoe.progress import Progress, quiet
from prismoe.routing.benchmarks import benchmark_files
from prismoe.routing.meter import RoutingMeter, Taken, metering
from prismoe.routing.record import RoutingTrace
from prismoe.routing.sample import NO_TOKEN, Piece, draw_pieces
from prismoe.routing.texts import TracedText, benchmark_text, domain_text
from prismoe.train.device import num_threads
from prismoe.train.experts import use_experts
from prismoe.train.fit import check_fit, num_experts
from prismoe.train.model import load_model

__all__ = ["Found", "RoutingTrace", "check_mixture", "read_text", "trace"]


def trace(
    model: str | Path | Checkpoint,
    domains: Iterable[Domain | str | Path],
    *,
    benchmarks: str | Sequence[str] = (),
    seq_len: int = 512,
    max_tokens: int | None = 32_768,
    sample_tokens: int = 4096,
    batch_size: int = 16,
    threads: int = 0,
    device: str = "auto",
    seed: int = 0,
    offline: bool = False,
    on_progress: Progress = quiet,
) -> RoutingTrace:
    """What the routers of `model` do with the held-out split of `domains`, and with `benchmarks`.

    Computed in float32 whatever the stored dtype, in evaluation mode, by the stock class. Integer counts do not depend
    on `batch_size`, as far as no two logits are within rounding of each other.

    Args:
        model: a folder or hub name of a mixture.
        domains: prepared domains, of the model's tokenizer.
        benchmarks: JSONL files of benchmark items, globs or folders (`read_items`): further "domains".
        seq_len: windows are of at most so many ids (`heldout_windows`).
        max_tokens: of each domain (windows drawn by `seed`) or benchmark (its first items); None: all.
        sample_tokens: places of the sample of each domain (`draw_pieces`).
        batch_size: windows of one length in a forward pass; memory grows with it and with nothing else.
        device: "auto" (CUDA where there is), "cpu", "cuda" or "cuda:N".
        seed: of what is drawn.

    Raises:
        UsageError: no domain, or a device that is not here.
        InputError: a model without a router, a domain without text, or ids and tokenizers that do not fit.
        NumericalError: logits that are not finite.
    """
    checkpoint = Checkpoint.open(model, offline=offline)
    where = str(checkpoint.folder)
    opened = [domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains]
    check_mixture(checkpoint)
    texts = _texts(checkpoint, opened, benchmarks, seq_len=seq_len, max_tokens=max_tokens, seed=seed)
    place = _device(device)
    facts: dict[str, Any] = {
        "model": {
            "folder": where,
            "model_type": checkpoint.config.get("model_type"),
            "fingerprint": checkpoint.fingerprint,
            "manifest": sha256_file(checkpoint.folder / MANIFEST) if (checkpoint.folder / MANIFEST).is_file() else None,
        },
        "tokenizer_sha256": opened[0].tokenizer_sha256,
        "texts": {text.name: text.sha256 for text in texts},
        "seed": seed,
        "seq_len": seq_len,
        "max_tokens": max_tokens,
        "device": place.type,
        "versions": versions(),
    }
    with num_threads(threads):
        loaded = load_model(checkpoint.folder).to(place).eval()
        use_experts(loaded, device=place)
        _check_logits(loaded, next(texts[0].batches(1))[1], place, where=where)
        with metering(loaded, device=place) as meter, torch.no_grad():
            done, total = 0, sum(len(text.spans_W2) for text in texts)
            found = []
            for text in texts:
                on_progress(f"trace: {text.name}", done, total)
                found.append(
                    read_text(loaded, text, meter, size=sample_tokens, batch_size=batch_size, seed=seed, where=where)
                )
                done += len(text.spans_W2)
            on_progress("trace", done, total)
            return _assemble(texts, found, meter, facts)


def check_mixture(checkpoint: Checkpoint) -> None:
    """That there is something to trace, from config and index alone.

    Raises:
        InputError: a dense model, or a folder without weights.
    """
    where = str(checkpoint.folder)
    if not num_experts(checkpoint.config):
        raise InputError("no router in it: a dense model", where=where, needed="a mixture", hint="prismoe convert")
    if not checkpoint.has_weights:
        raise InputError("no weights", where=where, needed="model.safetensors")


def _texts(
    checkpoint: Checkpoint,
    domains: Sequence[Domain],
    benchmarks: str | Sequence[str],
    *,
    seq_len: int,
    max_tokens: int | None,
    seed: int,
) -> list[TracedText]:
    """All that will be read, after checking that it belongs to the model."""
    if not domains:
        raise UsageError("nothing to trace", needed="at least one prepared domain")
    check_fit(checkpoint, domains, seq_len=seq_len)
    texts = [domain_text(domain, seq_len=seq_len, max_tokens=max_tokens, seed=seed) for domain in domains]
    if files := benchmark_files(benchmarks):
        tokenizer = DocumentTokenizer.open(checkpoint.folder)
        texts += [
            benchmark_text(name, path, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
            for name, path in files.items()
        ]
    names = [text.name for text in texts]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two texts called {min(twice)}", where="benchmarks", needed="a name of its own for each")
    return texts


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"no {name} here", where="trace.device", needed="auto or cpu")
    return torch.device(name)


def _check_logits(model: Any, ids_BT: npt.NDArray[np.int64], device: torch.device, *, where: str) -> None:
    """One window through the whole model: the trace itself leaves the head out and would not see its numbers."""
    with torch.no_grad():
        logits_BTV = model(input_ids=torch.from_numpy(ids_BT).to(device), use_cache=False).logits
    if not torch.isfinite(logits_BTV).all():
        raise NumericalError("logits are not finite", where=where, hint="a weight is not, or training has diverged")


@dataclass(frozen=True, eq=False)
class Found:
    """What was found in one text: its sums, and its part of the sample."""

    taken: Taken
    tokens_S: npt.NDArray[np.int32]
    experts_SLK: npt.NDArray[np.int16]
    weights_SLK: npt.NDArray[np.float32]


def read_text(
    model: Any, text: TracedText, meter: RoutingMeter, *, size: int, batch_size: int, seed: int, where: str
) -> Found:
    """Read one text; `where` names the model.

    Raises:
        NumericalError: a router or a layer's output is not finite.
    """
    pieces = draw_pieces(text.spans_W2, size=size, name=text.name, seed=seed)
    by_window: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_window.setdefault(piece.window, []).append(piece)
    used = pieces[-1].place + pieces[-1].length + 1 if pieces else 0
    shape = (used, len(meter.layers), meter.top_k)
    sample = np.full(used, NO_TOKEN, np.int32), np.full(shape, -1, np.int16), np.zeros(shape, np.float32)
    device = next(model.parameters()).device
    for first, ids_BT in text.batches(batch_size):
        meter.begin(ids_BT.shape[1])
        model.base_model(input_ids=torch.from_numpy(ids_BT).to(device), use_cache=False)
        chosen_LBTK, weights_LBTK = meter.add()
        for row in range(len(ids_BT)):
            for piece in by_window.get(first + row, ()):
                there, here = (
                    slice(piece.place, piece.place + piece.length),
                    slice(piece.first - 1, piece.first - 1 + piece.length),
                )
                sample[0][there] = ids_BT[row, 1:][here]
                sample[1][there] = chosen_LBTK[:, row, here].transpose(0, 1).cpu().numpy()
                sample[2][there] = weights_LBTK[:, row, here].transpose(0, 1).cpu().numpy()
    taken = meter.take()
    bad = ~np.isfinite(taken.entropy_L) | ~np.isfinite(taken.norm_L) | ~np.isfinite(taken.importance_LE).all(-1)
    if bad.any():
        layer = meter.layers[int(np.flatnonzero(bad)[0])]
        raise NumericalError(f"layer {layer} computes NaN or infinity on {text.name}", where=where)
    return Found(taken, *sample)


def _assemble(
    texts: Sequence[TracedText], found: Sequence[Found], meter: RoutingMeter, facts: dict[str, Any]
) -> RoutingTrace:
    longest = max(len(part.tokens_S) for part in found)

    def filled(name: str, value: int) -> Any:
        """The samples of all domains in one array, the short ones filled up."""
        parts = [getattr(part, name) for part in found]
        pads = [np.full((longest - len(part), *part.shape[1:]), value, part.dtype) for part in parts]
        return np.stack([np.concatenate(pair) for pair in zip(parts, pads, strict=True)])

    taken = [part.taken for part in found]
    tokens_G = np.array([part.tokens for part in taken], np.int64)
    return RoutingTrace(
        domains=tuple(text.name for text in texts),
        kinds=tuple(text.kind for text in texts),
        layers=meter.layers,
        num_experts=meter.num_experts,
        top_k=meter.top_k,
        tokens_G=tokens_G,
        load_GLE=np.stack([part.load_LE for part in taken]),
        importance_GLE=np.stack([part.importance_LE for part in taken]),
        coactivation_LEE=np.sum([part.coactivation_LEE for part in taken], axis=0),
        entropy_GL=np.stack([part.entropy_L for part in taken]) / tokens_G[:, None],
        norm_GL=np.stack([part.norm_L for part in taken]) / tokens_G[:, None],
        sample_tokens_GS=filled("tokens_S", NO_TOKEN),
        sample_experts_GSLK=filled("experts_SLK", -1),
        sample_weights_GSLK=filled("weights_SLK", 0),
        provenance=facts,
    )
