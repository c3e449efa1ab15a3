"""`calibrate`: what text tells of the neurons of a dense model, layer by layer.

Text goes through the stock transformers class; hooks on its feed-forward blocks add up what passes. The weights stay
as they are and get no gradients.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.calibrate.embedder import encoder_fingerprint
from prismoe.calibrate.needs import check_needs
from prismoe.calibrate.settings import CalibrateConfig
from prismoe.calibrate.text import Text, draw_text
from prismoe.checkpoint import Checkpoint
from prismoe.data.shards import Domain
from prismoe.errors import InputError, InterruptedRun, UsageError
from prismoe.folder import MANIFEST, Manifest, bytes_there, claim, hash_files, remove_folder, sha256_file, versions
from prismoe.progress import Progress, quiet
from prismoe.stats.calibration import KIND, SCRATCH, SEQUENCES, Calibration, layer_file
from prismoe.train.fit import check_fit

__all__ = ["CalibrateConfig", "Calibration", "calibrate"]

LONGEST = 2048  # ids of a window where the config leaves it to us
_NOT_IN_THE_RESULT = ("threads", "save_seconds")  # they change how fast and how often, not what


def calibrate(
    source: str | Path | Checkpoint,
    config: CalibrateConfig,
    *,
    domains: Iterable[Domain | str | Path],
    out: str | Path,
    offline: bool = False,
    force: bool = False,
    dry_run: bool = False,
    on_progress: Progress = quiet,
) -> Calibration:
    """Measure the neurons of every layer of `source` on text, and leave one file of `NeuronStats` per layer in `out`.

    Importance is first-order Taylor importance (Molchanov et al. 2017; LLaMA-MoE, arXiv 2406.16554, section 3.1) at
    the input h of down_proj: |h·∂ℒ/∂h|, ℒ the language-model loss summed over the tokens of a sequence, in nats. So
    it is nats a token. (The published code takes the mean loss: its numbers are ours over seq_len - 1.)

    Memory: the weights of `layers_at_once` layers, embedding and head; activations of one batch through them; per
    layer 32·F bytes of sums, and 4·F² if co-activation is asked for. Nothing grows with the text: sampled vectors,
    importance by sequence and, between windows of layers, hidden states are on disk. A stopped call goes on when it
    is made again, and gives the same bytes.

    Args:
        source: a dense checkpoint, its folder or hub name.
        domains: prepared domains (or their folders); their train splits are read.
        dry_run: check everything, estimate memory and disk, compute nothing.

    Raises:
        UsageError: fewer sequences than data clusters, a domain without a share, more marks than neurons, …
        InputError: a damaged or foreign checkpoint or domain, or text that does not fall into so many clusters.
        ResourceError: not enough memory or disk, or `out` is in use or not ours.
        NumericalError: a loss, sum or importance that is not finite, naming the layer.
        InterruptedRun: interrupted by the user; the same call goes on.
    """
    started, out = time.monotonic(), Path(out)
    checkpoint = Checkpoint.open(source, offline=offline)
    config = _fit(config, checkpoint)
    opened = [domain if isinstance(domain, Domain) else Domain.open(domain) for domain in domains]
    check_fit(checkpoint, opened, seq_len=config.seq_len)
    text = draw_text(
        opened,
        weights=config.weights,
        seq_len=config.seq_len,
        max_tokens=config.max_tokens,
        sample_tokens=config.sample_tokens,
        start_token=config.start_token,
        seed=config.seed,
    )
    if isinstance(config.clusters, int) and len(text) < config.clusters:
        raise UsageError(
            f"{len(text)} sequences for {config.clusters} data clusters",
            where="calibrate.clusters",
            needed="at least one sequence each",
            hint="raise max_tokens or lower seq_len",
        )
    settings = {name: value for name, value in asdict(config).items() if name not in _NOT_IN_THE_RESULT}
    job = _Job(checkpoint, text, config, {**settings, "quantities": list(config.quantities)})
    state, key = "dry run", job.key
    there = bytes_there(out, kind=KIND, key=key, force=force)
    needs = check_needs(checkpoint.family, text, config, out=out, there=there)
    if not dry_run:
        with claim(out, kind=KIND, key=key, force=force):
            state = "already complete"
            if Manifest.read(out) is None:
                state = "written"
                _compute(job, out, on_progress)
            remove_folder(out / SCRATCH)  # also where a kill came between the manifest and this
    return replace(
        job.planned(out) if dry_run else Calibration.open(out),
        state=state,
        memory_bytes=needs.memory_bytes,
        disk_bytes=needs.disk_bytes,
        seconds=time.monotonic() - started,
    )


def _fit(config: CalibrateConfig, checkpoint: Checkpoint) -> CalibrateConfig:
    if not checkpoint.has_weights:
        raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
    dense = checkpoint.family
    seq_len = config.seq_len or min(LONGEST, dense.max_positions)
    if seq_len < 2:
        raise UsageError(f"{seq_len}", where="calibrate.seq_len", needed="at least 2")
    if config.num_marks > dense.intermediate_size:
        raise UsageError(
            f"{config.num_marks} marks a token among {dense.intermediate_size} neurons",
            where="calibrate.marks_per_token",
            needed=f"at most {dense.intermediate_size}",
        )
    return replace(config, seq_len=seq_len, device=_device(config.device))


def _device(name: str) -> str:
    """The device that "auto" means here; it decides bits of the result, so it is settled first."""
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[name.partition(":")[0]]:
        raise UsageError(f"no {name} here", where="calibrate.device", needed="auto or cpu")
    return name


@dataclass(frozen=True, eq=False)
class _Job:
    """One calibration, checked. `settings` are those that decide the result."""

    checkpoint: Checkpoint
    text: Text
    config: CalibrateConfig
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        parts = [self.checkpoint.fingerprint, self.parents, self.settings, versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def parents(self) -> dict[str, str]:
        texts = {f"domain {d.name}": sha256_file(d.folder / MANIFEST) for d in self.text.domains}
        encoder = self.config.encoder
        encoders = {} if encoder is None else {"encoder": encoder_fingerprint(Path(encoder))}
        return {"source": self.checkpoint.fingerprint, **texts, **encoders}

    def planned(self, out: Path) -> Calibration:
        """The receipt before anything is computed; `cluster_domains` are not known yet."""
        return Calibration(
            folder=out,
            source=self.checkpoint.fingerprint,
            num_layers=self.checkpoint.family.num_layers,
            quantities=self.config.quantities,
            num_clusters=len(self.text.domains) if self.config.clusters == "domains" else int(self.config.clusters),
            num_sequences=len(self.text),
            num_tokens=self.text.num_tokens,
            loss=None,
            cluster_domains=(),
            domains=tuple(domain.name for domain in self.text.domains),
            settings=self.settings,
        )


def _compute(job: _Job, out: Path, on_progress: Progress) -> None:
    from prismoe.calibrate.sweep import Sweep  # torch and transformers are heavy: only here
    from prismoe.train.device import num_threads

    try:
        with num_threads(job.config.threads):
            sweep = Sweep(job.checkpoint, job.text, job.config, out=out, on_progress=on_progress)
            sweep.run()
    except KeyboardInterrupt:
        raise InterruptedRun("interrupted", where=str(out), hint="the same command goes on") from None
    planned = job.planned(out)
    composition = np.zeros((planned.num_clusters, len(planned.domains)), np.int64)
    np.add.at(composition, (sweep.labels_N, job.text.domain_ids), 1)
    result = {
        name: getattr(planned, name)
        for name in ("num_layers", "num_clusters", "num_sequences", "num_tokens", "domains")
    }
    predicted = int(sweep.cluster_tokens.sum())
    loss = sweep.nats / predicted if job.config.gradient else None
    Manifest(
        kind=KIND,
        key=job.key,
        parents=job.parents,
        config={**job.settings, "result": {**result, "loss": loss, "cluster_domains": composition.tolist()}},
        files=hash_files(out, [SEQUENCES, *map(layer_file, range(planned.num_layers))]),
    ).write(out)
