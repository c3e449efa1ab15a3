"""`RoutingTrace`: what the routers of a mixture did with text, one .safetensors file. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint.tensorfile import DTYPES, read_sealed, sealed_bytes
from prismoe.errors import InputError
from prismoe.folder import write_atomic
from prismoe.strictjson import parse_json

__all__ = ["FILE", "Kind", "RoutingTrace"]

FORMAT = "prismoe-trace-1"
FILE = "trace.safetensors"
Kind = Literal["train", "benchmark"]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

TENSORS: dict[str, tuple[str, str]] = {
    "tokens_G": ("I64", "G"),
    "load_GLE": ("I64", "GLE"),
    "importance_GLE": ("F64", "GLE"),
    "coactivation_LEE": ("I64", "LEE"),
    "entropy_GL": ("F64", "GL"),
    "norm_GL": ("F64", "GL"),
    "sample_tokens_GS": ("I32", "GS"),
    "sample_experts_GSLK": ("I16", "GSLK"),
    "sample_weights_GSLK": ("F32", "GSLK"),
}
"""Every tensor of a file: dtype and shape letters (G domains, L layers with a router, E experts, K kept, S sampled)."""


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """What the routers of one model did with some text of each domain.

    domains, kinds [G]: training domains first, then benchmarks. layers [L]: the numbers of the layers that have a
    router. tokens_G: tokens of text counted (not the token that opens a window).
    load_GLE: how often an expert was chosen; adds up to tokens·K over experts. importance_GLE: the sum of the weights
    that the routers gave it. coactivation_LEE: tokens of all domains that chose both; the diagonal is the load.
    entropy_GL: mean over tokens of the entropy of the softmax over all logits, nats. norm_GL: mean over tokens of
    ‖MoE output‖₂ (shared experts included).

    The sample is pieces of text in reading order; a token of -1 stands behind each piece and fills up a short domain
    (experts -1, weights 0 there). sample_experts_GSLK, sample_weights_GSLK: the K experts of each token and layer, in
    the router's own order, and their weights.

    `provenance`: model (folder, model_type, fingerprint, manifest sha256), tokenizer_sha256, domains (manifest or file
    sha256 of each), seed, seq_len, max_tokens, versions.
    """

    domains: tuple[str, ...]
    kinds: tuple[Kind, ...]
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    tokens_G: IntArray
    load_GLE: IntArray
    importance_GLE: FloatArray
    coactivation_LEE: IntArray
    entropy_GL: FloatArray
    norm_GL: FloatArray
    sample_tokens_GS: npt.NDArray[np.int32]
    sample_experts_GSLK: npt.NDArray[np.int16]
    sample_weights_GSLK: npt.NDArray[np.float32]
    provenance: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write one .safetensors file with a readable header; equal traces give equal bytes.

        Raises:
            ResourceError: it cannot be written.
        """
        arrays = {
            name: np.ascontiguousarray(getattr(self, name), DTYPES[dtype]) for name, (dtype, _) in TENSORS.items()
        }
        entries = [(name, TENSORS[name][0], array.shape) for name, array in arrays.items()]
        facts = {name: getattr(self, name) for name in ("domains", "kinds", "layers", "num_experts", "top_k")}
        text = json.dumps({**facts, "provenance": dict(self.provenance)}, sort_keys=True, allow_nan=False)
        data = b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays.values())
        write_atomic(Path(path), sealed_bytes(entries, data, metadata={"format": FORMAT, "trace": text}))

    @classmethod
    def open(cls, path: str | Path) -> RoutingTrace:
        """Read one: a file, or a folder with `trace.safetensors` in it or below its `trace` (a run folder).

        Raises:
            InputError: not a trace, or damaged.
        """
        path = Path(path)
        if path.is_dir():
            found = [place for place in (path / FILE, path / "trace" / FILE) if place.is_file()]
            if not found:
                raise InputError("no trace in it", where=str(path), hint="make one with `prismoe trace`")
            path = found[0]
        where = str(path)
        infos, metadata, data = read_sealed(path, keys={"format", "trace"})
        if metadata.get("format") != FORMAT or {name: info.dtype for name, info in infos.items()} != {
            name: dtype for name, (dtype, _) in TENSORS.items()
        }:
            raise InputError("not a routing trace", where=where, needed=FORMAT, hint="make one with `prismoe trace`")
        facts = parse_json(metadata.get("trace", "").encode(), where=where)
        try:
            named = {
                "domains": tuple(str(name) for name in facts["domains"]),
                "kinds": tuple({"train": "train", "benchmark": "benchmark"}[kind] for kind in facts["kinds"]),
                "layers": tuple(int(number) for number in facts["layers"]),
                "num_experts": int(facts["num_experts"]),
                "top_k": int(facts["top_k"]),
                "provenance": dict(facts["provenance"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"not a readable header ({error!r})", where=where) from error
        arrays = {
            name: np.frombuffer(data, DTYPES[info.dtype], count=math.prod(info.shape), offset=info.start).reshape(
                info.shape
            )
            for name, info in infos.items()
        }
        trace = cls(**named, **arrays)  # type: ignore[arg-type]
        trace.check(where=where)
        return trace

    def check(self, *, where: str) -> None:
        """Shapes agree, counts add up, numbers are finite.

        Raises:
            InputError: naming the tensor.
        """
        sample = self.sample_tokens_GS.shape[1] if self.sample_tokens_GS.ndim == 2 else 0
        sizes = {"G": len(self.domains), "L": len(self.layers), "E": self.num_experts, "K": self.top_k, "S": sample}
        for name, (dtype, letters) in TENSORS.items():
            array, needed = getattr(self, name), tuple(sizes[letter] for letter in letters)
            if array.shape != needed:
                raise InputError(f"shape {list(array.shape)}", where=f"{where}: {name}", needed=f"{list(needed)}")
            if dtype in ("F32", "F64") and not np.isfinite(array).all():
                raise InputError("not finite", where=f"{where}: {name}")
        if len(self.kinds) != len(self.domains):
            raise InputError(
                f"{len(self.kinds)} kinds", where=where, needed=f"{len(self.domains)}, one for each domain"
            )
        if not np.array_equal(
            self.load_GLE.sum(-1), np.repeat(self.tokens_G[:, None], len(self.layers), 1) * self.top_k
        ):
            raise InputError("loads do not add up", where=f"{where}: load_GLE", needed=f"{self.top_k} for each token")
        if not np.array_equal(np.diagonal(self.coactivation_LEE, axis1=1, axis2=2), self.load_GLE.sum(0)):
            raise InputError("its diagonal is not the load", where=f"{where}: coactivation_LEE")
        experts = self.sample_experts_GSLK
        if experts.size and not (experts.min() >= -1 and experts.max() < self.num_experts):
            raise InputError(
                "unknown experts", where=f"{where}: sample_experts_GSLK", needed=f"below {self.num_experts}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The header and the numbers without the sample, JSON-able."""
        kept = {key: value for key, value in asdict(self).items() if not key.startswith("sample_")}
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in kept.items()}
