"""A finished calibration: a folder with one file of `NeuronStats` per layer and one that says which text was read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint.tensorfile import DTYPES, header_bytes, read_header
from prismoe.errors import InputError
from prismoe.folder import Manifest, check_once, write_atomic
from prismoe.stats import NeuronStats, check_stats

__all__ = ["KIND", "SCRATCH", "SEQUENCES", "Calibration", "Sequences", "layer_file"]

KIND = "calibrate"
SEQUENCES = "sequences.safetensors"
SCRATCH = "scratch"  # a folder that is there only until the calibration is whole
FORMAT = "prismoe-sequences-1"
IntArray = npt.NDArray[np.integer[Any]]
_FIELDS = {"domain_ids": "I32", "windows": "I64", "clusters": "I32", "samples": "I64"}


@dataclass(frozen=True, eq=False)
class Sequences:
    """The text that was read. Sequence n was window `windows[n]` of domain `domain_ids[n]`, of data cluster
    `clusters[n]` ([N] each); the sampled tokens are `samples` [S], ascending, as n·seq_len + position.
    """

    domain_ids: IntArray
    windows: IntArray
    clusters: IntArray
    samples: IntArray

    def save(self, path: Path) -> None:
        """Write one .safetensors file."""
        arrays = {name: np.ascontiguousarray(getattr(self, name), DTYPES[dtype]) for name, dtype in _FIELDS.items()}
        entries = [(name, _FIELDS[name], array.shape) for name, array in arrays.items()]
        data = b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in arrays.values())
        write_atomic(path, header_bytes(entries, metadata={"format": FORMAT}) + data)

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Read one.

        Raises:
            InputError: not such a file, or damaged.
        """
        infos, header = read_header(path)
        if header.get("format") != FORMAT or {name: info.dtype for name, info in infos.items()} != _FIELDS:
            raise InputError("not a file of sequences", where=str(path), needed=FORMAT)
        data = path.read_bytes()
        arrays = {}
        for name, info in infos.items():
            if len(info.shape) != 1 or not info.shape[0]:
                raise InputError(f"shape {list(info.shape)}", where=f"{path}: {name}", needed="one row of numbers")
            arrays[name] = np.frombuffer(data, DTYPES[info.dtype], count=math.prod(info.shape), offset=info.start)
            if arrays[name].min() < 0:
                raise InputError("is negative", where=f"{path}: {name}")
        return cls(**arrays)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 < value < 2**53:
        raise TypeError(f"{value!r} is not a count")
    return value


@dataclass(frozen=True, eq=False)
class Calibration:
    """Receipt of `calibrate` and handle on its folder: one file of statistics per layer.

    `source` is the fingerprint of the dense model. `loss` is nats a token, where the quantities needed it.
    `cluster_domains` [C][G] counts the sequences of each domain in each data cluster. `state` is "written", "already
    complete", "opened" or "dry run"; memory and disk in bytes are what the job needs at most.
    """

    folder: Path
    source: str
    num_layers: int
    quantities: tuple[str, ...]
    num_clusters: int
    num_sequences: int
    num_tokens: int
    loss: float | None
    cluster_domains: tuple[tuple[int, ...], ...]
    domains: tuple[str, ...]
    settings: Mapping[str, Any]
    state: str = "opened"
    memory_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def open(cls, folder: str | Path) -> Calibration:
        """Open a finished folder.

        Raises:
            InputError: not the output of `calibrate`, or a file is missing or not as long as the manifest says.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest is None or manifest.kind != KIND:
            raise InputError("not a finished calibration", where=str(folder), hint="make it with `prismoe calibrate`")
        try:
            config = dict(manifest.config)
            result = dict(config.pop("result"))
            calibration = cls(
                folder=folder,
                source=str(manifest.parents["source"]),
                num_layers=_count(result["num_layers"]),
                quantities=tuple(str(name) for name in config["quantities"]),
                num_clusters=_count(result["num_clusters"]),
                num_sequences=_count(result["num_sequences"]),
                num_tokens=_count(result["num_tokens"]),
                loss=None if result["loss"] is None else float(result["loss"]),
                cluster_domains=tuple(tuple(int(n) for n in row) for row in result["cluster_domains"]),
                domains=tuple(str(name) for name in result["domains"]),
                settings=config,
            )
            if not calibration.num_clusters <= calibration.num_sequences <= calibration.num_tokens:
                raise ValueError("counts of clusters, sequences and tokens")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            where = str(folder / "manifest.json")
            raise InputError(f"not a readable manifest ({error!r})"[:200], where=where) from error
        for name in chain((SEQUENCES,), map(layer_file, range(calibration.num_layers))):
            path, entry = folder / name, manifest.files.get(name)
            size = path.stat().st_size if path.is_file() else None
            if entry is None or size != entry["bytes"]:
                raise InputError(
                    "missing" if size is None else f"{size} bytes",
                    where=str(path),
                    needed=f"{entry['bytes']} bytes (manifest.json)" if entry else "an entry in manifest.json",
                    hint="calibrate again",
                )
        return calibration

    def sequences(self) -> Sequences:
        """Which text was read, and the data cluster of each sequence.

        Raises:
            InputError: the file is damaged or does not fit the others; a data cluster without a sequence.
        """
        path = self.folder / SEQUENCES
        check_once(self.folder, [SEQUENCES])
        found = Sequences.load(path)
        if {len(found.domain_ids), len(found.windows), len(found.clusters)} != {self.num_sequences}:
            raise InputError(f"{len(found.clusters)} sequences", where=str(path), needed=f"{self.num_sequences}")
        if found.samples.max() >= self.num_tokens or found.domain_ids.max() >= len(self.domains):
            raise InputError("a token or domain that is not there", where=str(path))
        if np.bincount(found.clusters, minlength=self.num_clusters).astype(bool).tolist() != [True] * self.num_clusters:
            raise InputError("a data cluster without tokens", where=str(path), needed=f"{self.num_clusters} clusters")
        return found

    def layer(self, layer: int) -> NeuronStats:
        """The statistics of one layer, checked.

        Raises:
            InputError: no such layer, or its file is damaged.
        """
        if not 0 <= layer < self.num_layers:
            raise InputError(f"no layer {layer}", where=str(self.folder), needed=f"0 to {self.num_layers - 1}")
        path = self.folder / layer_file(layer)
        check_once(self.folder, [path.name])
        stats = NeuronStats.load(path)
        if stats.layer != layer:
            raise InputError(f"holds layer {stats.layer}", where=str(path))
        sequences, length = self.sequences(), self.num_tokens // self.num_sequences
        sampled = not all(array is None for array in (stats.inputs, stats.marks, stats.scores))
        stats = replace(
            stats,
            cluster_tokens=np.bincount(sequences.clusters) * (length - 1),
            sample_clusters=sequences.clusters[sequences.samples // length].astype(np.int32) if sampled else None,
        )
        check_stats(stats, where=str(path))
        return stats

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {name: str(value) if name == "folder" else value for name, value in vars(self).items()}


def layer_file(layer: int) -> str:
    """Name of the file of one layer."""
    return f"layer-{layer:05d}.safetensors"
