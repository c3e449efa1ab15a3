"""`Similarity`: how alike the experts of a mixture are, one .safetensors file. No torch here.

A run folder keeps it as `similarity/similarity.safetensors`, with a manifest beside it; `Similarity.open` takes the
file, its folder or the run folder. The header says everything that is no array: layers, experts, what it was measured
against, provenance. Definitions: docs/experts.md.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint.tensorfile import header_bytes, read_header
from prismoe.errors import InputError
from prismoe.strictjson import parse_json

__all__ = ["DUPLICATE", "FILE", "FOLDER", "Duplicate", "Similarity"]

FORMAT = "prismoe-similarity-1"
FOLDER, FILE = "similarity", "similarity.safetensors"
DUPLICATE = 0.999
"""Cosine above which two experts are called copies of each other."""

Floats = npt.NDArray[np.float64]

TENSORS = {"cosine_LEE": "LEE", "matched_LEE": "LEE", "dense_LE": "LE", "drift_LE": "LE", "router_drift_L": "L"}
"""Every tensor of a file, all of them float64, and its shape letters; the last three are there where measured."""
ALWAYS = {"cosine_LEE", "matched_LEE"}


@dataclass(frozen=True)
class Duplicate:
    """Two experts of a layer whose `cosine` is above `DUPLICATE`."""

    layer: int
    first: int
    second: int
    cosine: float


@dataclass(frozen=True, eq=False)
class Similarity:
    """Routed experts of one mixture. layers [L]: the numbers of the layers that have experts.

    cosine_LEE: of every two experts, all their weights (gate, up, down) as one vector; symmetric, diagonal 1. Only
    experts that began with the same neurons can be alike by it. matched_LEE: mean over the neurons of the row's expert
    of the best cosine with a neuron of the column's expert, whatever its place; not symmetric, diagonal 1.

    dense_LE: cosine of an expert with the dense neurons that it was cut from, where a dense model was given.
    drift_LE, router_drift_L: ‖now - before‖ / ‖before‖ of an expert's weights and of a layer's router rows, where an
    earlier checkpoint was given. NaN where an expert, or what it is compared with, is all zeros.

    `sampled` is how many neurons of an expert `matched_LEE` looked at, its width where that is less. `provenance`:
    model, dense, before (folder, model_type, fingerprint; None where not given), plan (sha256 or None), versions.
    """

    layers: tuple[int, ...]
    num_experts: int
    sampled: int
    cosine_LEE: Floats
    matched_LEE: Floats
    dense_LE: Floats | None
    drift_LE: Floats | None
    router_drift_L: Floats | None
    provenance: Mapping[str, Any]

    @property
    def duplicates(self) -> tuple[Duplicate, ...]:
        """Pairs of experts with a cosine above `DUPLICATE`, by layer, the first expert before the second."""
        return tuple(
            Duplicate(number, int(a), int(b), float(cosine_EE[a, b]))
            for number, cosine_EE in zip(self.layers, self.cosine_LEE, strict=True)
            for a, b in np.argwhere(np.triu(cosine_EE, 1) > DUPLICATE)
        )

    def to_bytes(self) -> bytes:
        """A .safetensors file; equal results give equal bytes."""
        arrays = {name: value for name in TENSORS if (value := getattr(self, name)) is not None}
        facts = {name: getattr(self, name) for name in ("layers", "num_experts", "sampled")}
        text = json.dumps({**facts, "provenance": dict(self.provenance)}, sort_keys=True, allow_nan=False)
        entries = [(name, "F64", array.shape) for name, array in arrays.items()]
        data = b"".join(np.ascontiguousarray(array, "<f8").tobytes() for array in arrays.values())
        return header_bytes(entries, metadata={"format": FORMAT, "similarity": text}) + data

    @classmethod
    def open(cls, path: str | Path) -> Similarity:
        """Read one: a file, the folder that holds it, or a run folder.

        Raises:
            InputError: not one of ours, or damaged.
        """
        path = Path(path)
        if path.is_dir():
            found = [place for place in (path / FILE, path / FOLDER / FILE) if place.is_file()]
            if not found:
                raise InputError("no similarity in it", where=str(path), hint="make one with `prismoe similarity`")
            path = found[0]
        where = str(path)
        infos, metadata = read_header(path)
        known = {"F64"} >= {info.dtype for info in infos.values()} and ALWAYS <= infos.keys() <= TENSORS.keys()
        if metadata.get("format") != FORMAT or not known:
            raise InputError("not a similarity", where=where, needed=FORMAT, hint="make one with `prismoe similarity`")
        facts = parse_json(metadata.get("similarity", "").encode(), where=where)
        try:
            layers = tuple(int(number) for number in facts["layers"])
            sizes = {"L": len(layers), "E": int(facts["num_experts"])}
            sampled, provenance = int(facts["sampled"]), dict(facts["provenance"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a readable header ({error!r})", where=where) from error
        for name, info in infos.items():
            needed = tuple(sizes[letter] for letter in TENSORS[name])
            if info.shape != needed:
                raise InputError(f"shape {list(info.shape)}", where=f"{where}: {name}", needed=f"{list(needed)}")
        data = path.read_bytes()
        arrays: dict[str, Any] = dict.fromkeys(TENSORS)
        for name, info in infos.items():
            flat = np.frombuffer(data, "<f8", count=math.prod(info.shape), offset=info.start)
            arrays[name] = flat.reshape(info.shape)
        return cls(layers=layers, num_experts=sizes["E"], sampled=sampled, provenance=provenance, **arrays)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN becomes None, because JSON has none."""
        found: dict[str, Any] = {
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "sampled": self.sampled,
            "duplicates": [asdict(row) for row in self.duplicates],
            "provenance": dict(self.provenance),
        }
        for name in TENSORS:
            array = getattr(self, name)
            values = None if array is None else array.astype(object)
            if values is not None:
                values[np.isnan(array)] = None
            found[name] = None if values is None else values.tolist()
        return found
