"""`import`: a mixture in a private layout becomes one that stock transformers load, with what that changed measured."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import header_bytes, read_header
from prismoe.convert.layout import lay_out
from prismoe.convert.stream import Output, Written, check_room, finished, job_key, write_output
from prismoe.data.shards import Domain
from prismoe.errors import InputError, InterruptedRun, UsageError
from prismoe.folder import MANIFEST, FileEntry, claim, sha256_file, write_atomic
from prismoe.importing.llama_moe import LlamaMoe, mixtral_recipes, read_llama_moe
from prismoe.progress import Progress, quiet
from prismoe.strictjson import parse_json
from prismoe.target import check_rows, moe_config
from prismoe.targets import find_target
from prismoe.train.fit import check_fit

__all__ = ["Imported", "import_checkpoint"]

MEASURED, FITTED = "import.json", "routers.fitted"
TARGET = "mixtral"
KIND = "import"


@dataclass(frozen=True)
class Imported:
    """Receipt of `import_checkpoint`. Sizes in bytes, `seconds` of wall time, `state` as in `Conversion`.

    `measured` is None where the router is linear already and only moved; otherwise, on held-out text: `agreement` and
    `same_choice` by layer (see `Fit`), `perplexity_original`, `perplexity_fitted`, and the tokens of both texts.
    `bit_exact` says that folding the scale in rounded nothing.
    """

    out: str
    made_from: str
    target: str
    state: str
    num_experts: int
    top_k: int
    scales: tuple[float, ...]
    bit_exact: bool
    measured: dict[str, Any] | None
    num_tensors: int
    num_shards: int
    kept_shards: int
    dropped: tuple[str, ...]
    total_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: float
    files: dict[str, FileEntry]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Text:
    """What the routers are fitted on [N, T], what the fit is measured on [M, T], and what names both."""

    fit: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.int64]
    described: dict[str, Any]


def import_checkpoint(
    source: str | Path | Checkpoint,
    *,
    out: str | Path,
    domains: Iterable[Domain | str | Path] = (),
    seq_len: int = 512,
    fit_tokens: int = 16_384,
    heldout_tokens: int = 8_192,
    ridge: float = 1e-3,
    seed: int = 0,
    pad_to: int = 32,
    max_shard_bytes: int = 5_000_000_000,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Imported:
    """Write a LLaMA-MoE checkpoint (`model_type: llama_moe`, safetensors) as a stock Mixtral model.

    Experts, attention and embeddings keep every bit; the scale goes into w2. The tanh router, which no stock class
    has, becomes the linear one that is nearest to it on text. The layout's own code is not run.

    Args:
        source: the checkpoint, its folder or hub name.
        domains: prepared text: train splits for the fit, held-out splits to measure it. Not needed for linear routers.
        seq_len, fit_tokens, heldout_tokens: length of a sequence and how much of each text, in ids.
        ridge: regularisation, as a share of the mean squared input.
        pad_to, max_shard_bytes, force, dry_run: as in `convert`.

    Raises:
        UsageError: no text where routers have to be fitted, or too little.
        InputError: another layout, pickle files, damaged, or text of another tokenizer.
        NumericalError: numbers that are not finite.
        ResourceError: not enough disk or memory, or the output folder is in use or not ours.
        InterruptedRun: interrupted by the user; the same call continues.
    """
    started, out = time.monotonic(), Path(out)
    if pad_to < 1 or not math.isfinite(ridge) or ridge < 0:
        raise UsageError(f"pad_to {pad_to}, ridge {ridge}", where=KIND, needed="pad_to 1 or more, ridge 0 or more")
    checkpoint = Checkpoint.open(source, offline=offline)
    model = read_llama_moe(checkpoint)
    text = None
    if not model.linear:
        text = _text(checkpoint, domains, seq_len, fit_tokens, heldout_tokens, seed)
    settings = {"target": TARGET, "pad_to": pad_to, "max_shard_bytes": max_shard_bytes}
    settings |= {} if text is None else {"ridge": ridge, "seed": seed, "text": text.described}
    output = _output(checkpoint, model, settings, None, b"")
    free = check_room(output, out)
    if dry_run:
        return _receipt(output, out, Written("dry run", {}, 0), model, free=free, started=started)
    with claim(out, kind=KIND, key=output.key, force=force):
        if done := finished(out, kind=KIND, key=output.key):
            written = Written("already complete", done, len(output.shards))
        else:
            rows, measured = (None, b"") if text is None else _fitted(checkpoint, model, text, out, ridge, on_progress)
            output = _output(checkpoint, model, settings, rows, measured)
            written = write_output(output, out, on_progress=on_progress)
        (out / FITTED).unlink(missing_ok=True)
    return _receipt(output, out, written, model, free=free, started=started)


def _output(
    checkpoint: Checkpoint,
    model: LlamaMoe,
    settings: dict[str, Any],
    rows: list[npt.NDArray[np.float32]] | None,
    measured: bytes,
) -> Output:
    target = find_target(TARGET)
    config = moe_config(model.dense, model.shape, target, pad_to=settings["pad_to"])
    width = target.widths(model.shape, pad_to=settings["pad_to"])[0]
    check_rows(model.dense, target, width)
    recipes = mixtral_recipes(checkpoint, model, rows, width=width)
    side_files = {path.name: path.read_bytes() for path in checkpoint.side_files}
    return Output(
        kind=KIND,
        checkpoint=checkpoint,
        settings=settings,
        config=config,
        shards=lay_out(recipes, checkpoint.tensors, max_shard_bytes=settings["max_shard_bytes"]),
        files={**side_files, **({MEASURED: measured} if measured else {})},
        parents={"source": checkpoint.fingerprint},
        key=job_key(checkpoint, [KIND, settings, config], side_files=side_files),
    )


def _text(
    checkpoint: Checkpoint,
    domains: Iterable[Domain | str | Path],
    seq_len: int,
    fit_tokens: int,
    heldout_tokens: int,
    seed: int,
) -> _Text:
    opened = tuple(domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains)
    if not opened:
        hint = "prepare some with `prismoe prepare`, then domains=FOLDER"
        raise UsageError("its routers are tanh networks", where=KIND, needed="text to fit linear ones on", hint=hint)
    if seq_len < 2:
        raise UsageError(f"{seq_len}", where="seq_len", needed="2 or more")
    check_fit(checkpoint, opened, seq_len=seq_len)
    from prismoe.calibrate.text import draw_text

    start_token = all(domain.start_token is not None for domain in opened)
    drawn = draw_text(
        opened,
        weights="uniform",
        seq_len=seq_len,
        max_tokens=fit_tokens,
        sample_tokens=1,
        start_token=start_token,
        seed=seed,
    )
    heldout = _heldout(drawn.domains, seq_len=seq_len, max_tokens=heldout_tokens, start_token=start_token)
    described = {
        "domains": {domain.name: sha256_file(domain.folder / MANIFEST) for domain in drawn.domains},
        "seq_len": seq_len,
        "fit_tokens": drawn.num_tokens,
        "heldout_tokens": heldout.size,
    }
    return _Text(drawn.ids(0, len(drawn)), heldout, described)


def _heldout(domains: Sequence[Domain], *, seq_len: int, max_tokens: int, start_token: bool) -> npt.NDArray[np.int64]:
    """[M, T] windows of the held-out splits, as many of each domain, evenly spaced."""
    own, rows = seq_len - start_token, []
    wanted = max(1, max_tokens // (seq_len * len(domains)))
    for domain in domains:
        tokens = domain.tokens("heldout")
        available = len(tokens) // own
        if not available:
            where = f"domain {domain.name}"
            raise InputError(f"{len(tokens)} held-out tokens", where=where, needed=f"one sequence of {seq_len}")
        for window in np.unique(np.linspace(0, available - 1, min(wanted, available)).astype(np.int64)):
            ids = np.empty(seq_len, np.int64)
            ids[:1], ids[seq_len - own :] = domain.start_token or 0, tokens[window * own : (window + 1) * own]
            rows.append(ids)
    return np.stack(rows)


def _fitted(
    checkpoint: Checkpoint, model: LlamaMoe, text: _Text, out: Path, ridge: float, on_progress: Progress
) -> tuple[list[npt.NDArray[np.float32]], bytes]:
    """Router rows and import.json; read where an earlier, stopped run has them already."""
    path, shape = out / FITTED, (model.num_experts, model.dense.hidden_size)
    if not path.is_file():
        from prismoe.importing.fit import fit_routers

        try:
            fit = fit_routers(
                checkpoint, model, text=text.fit, heldout=text.heldout, ridge=ridge, on_progress=on_progress
            )
        except KeyboardInterrupt:
            raise InterruptedRun("stopped", where=str(out), hint="the same command continues") from None
        measured = {
            "agreement": fit.agreement,
            "same_choice": fit.same_choice,
            "mean_agreement": float(np.mean(fit.agreement)),
            "perplexity_original": math.exp(fit.loss_original),
            "perplexity_fitted": math.exp(fit.loss_fitted),
            **text.described,
        }
        entries = [(f"layers.{layer}", "F32", shape) for layer in range(len(fit.rows))]
        header = header_bytes(entries, metadata={"measured": json.dumps(measured, indent=2, sort_keys=True)})
        write_atomic(path, header + b"".join(rows.astype("<f4").tobytes() for rows in fit.rows))
    infos, metadata = read_header(path)
    data = path.read_bytes()
    rows = [
        np.frombuffer(data, "<f4", count=shape[0] * shape[1], offset=infos[f"layers.{layer}"].start).reshape(shape)
        for layer in range(model.dense.num_layers)
    ]
    return rows, metadata["measured"].encode() + b"\n"


def _receipt(output: Output, out: Path, written: Written, model: LlamaMoe, *, free: int, started: float) -> Imported:
    measured = None
    if written.files and (out / MEASURED).is_file():
        measured = parse_json((out / MEASURED).read_bytes(), where=str(out / MEASURED))
    return Imported(
        out=str(out),
        made_from=str(output.checkpoint.config["model_type"]),
        target=TARGET,
        state=written.state,
        num_experts=model.num_experts,
        top_k=model.top_k,
        scales=model.shape.scales,
        bit_exact=all(math.frexp(scale)[0] == 0.5 and scale >= 1 for scale in model.scales),
        measured=measured,
        num_tensors=sum(len(shard.keys) for shard in output.shards),
        num_shards=len(output.shards),
        kept_shards=written.kept_shards,
        dropped=output.dropped,
        total_bytes=output.total_bytes,
        free_bytes=free,
        memory_bytes=output.memory_bytes,
        seconds=round(time.monotonic() - started, 3),
        files=written.files,
    )
