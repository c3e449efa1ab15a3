"""A lazy, read-only view of a Hugging Face checkpoint folder. Builds no model and runs no code from the folder."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prismoe.checkpoint.stockconfig import refuse_code
from prismoe.checkpoint.tensorfile import DTYPES, TensorInfo, read_header
from prismoe.errors import InputError
from prismoe.folder import Manifest, check_once
from prismoe.strictjson import read_json

if TYPE_CHECKING:
    from prismoe.checkpoint.family import DenseConfig, Rows

__all__ = ["FFN", "Checkpoint", "TensorInfo"]

WEIGHT_DTYPES = ("F32", "F16", "BF16", "F64")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Carried over byte for byte; weights, config.json and code are not.
SIDE_FILES = re.compile(
    r"tokenizer[\w.-]*\.(json|model)|special_tokens_map\.json|added_tokens\.json|generation_config\.json"
    r"|chat_template[\w.-]*\.(json|jinja)|vocab\.(json|txt)|merges\.txt|spiece\.model|sentencepiece[\w.-]*\.model"
    r"|(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)[\w.-]*",
    re.IGNORECASE,
)
OWN_READERS = ("llama_moe",)
_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class FFN:
    """One layer's feed-forward weights: gate and up `[F, D]`, down `[D, F]`, in the dtype of the checkpoint.

    The arrays are views of the file: bytes are read when they are touched.
    """

    gate_FD: Array
    up_FD: Array
    down_DF: Array


class Checkpoint:
    """Keys, shapes, dtypes, config and FFN weights of an HF folder. Open one with `Checkpoint.open`."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, folder: Path, *, checked: bool = True) -> None:
        self.folder = folder
        self._manifest = Manifest.ours(folder) if checked else None
        if self._manifest is not None:  # what is small now, each shard when it is read
            small = [name for name in self._manifest.files if not name.endswith(".safetensors")]
            small = [name for name in small if (folder / name).is_file()]  # a plan may be left behind
            check_once(folder, small, manifest=self._manifest)
        self.config = _read_config(folder)
        self.tensors = MappingProxyType(_read_tensors(folder))
        self._maps: dict[Path, mmap.mmap] = {}

    @classmethod
    def open(cls, source: str | Path | Checkpoint, *, offline: bool = False, checked: bool = True) -> Checkpoint:
        """Open a local folder or a hub name ("owner/model", fetched once into the hub cache).

        A folder with `config.json` alone is enough for planning; `has_weights` tells. With `offline` no socket is
        opened: a hub name must already be in the cache. Where the folder has a manifest of ours, its files are hashed
        before they are read, unless `checked` is False.

        Raises:
            InputError: not a checkpoint, damaged, quantised, pickle-only, or needs code from the folder.
        """
        if isinstance(source, Checkpoint):
            return source
        folder = Path(source)
        if not folder.is_dir():
            if folder.exists():
                raise InputError("is a file", where=str(source), needed="a checkpoint folder")
            if not _HUB_NAME.fullmatch(str(source)):
                raise InputError("no such folder", where=str(source), needed="a checkpoint folder or a hub name")
            folder = _from_hub(str(source), offline=offline)
        return cls(folder, checked=checked)

    @property
    def donors(self) -> tuple[Checkpoint, ...]:
        """Itself alone; of a base with branches (`Branched`) the base, then each branch."""
        return (self,)

    @property
    def has_weights(self) -> bool:
        """False for a folder that holds `config.json` alone."""
        return bool(self.tensors)

    @cached_property
    def family(self) -> DenseConfig:
        """The configuration as one of the families we know; a dtype it does not name is that of the largest tensor.

        Raises:
            InputError: an unsupported family or feature, naming the field.
        """
        from prismoe.checkpoint.family import dense_config

        dense = dense_config(self.config, where=str(self.folder / "config.json"))
        if dense.dtype is None and self.tensors:
            stored = max(self.tensors.values(), key=lambda info: info.nbytes).dtype
            dense = replace(dense, dtype=np.dtype(DTYPES[stored]).name)
        return dense

    @cached_property
    def places(self) -> Mapping[str, Rows]:
        """See `tensor_rows`."""
        from prismoe.checkpoint.family import tensor_rows

        return tensor_rows(self.family)

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """Tokenizer, chat template, generation config and licence files, sorted by name."""
        found = sorted(path for path in self.folder.iterdir() if SIDE_FILES.fullmatch(path.name) and path.is_file())
        for path in found:
            _check_inside(self.folder, path)
        return tuple(found)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over config, tensor headers, file sizes and 4 KiB from the middle of every tensor.

        The sample tells two trainings of one architecture apart at the price of a page per tensor.
        """
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, info in sorted(self.tensors.items()):
            digest.update(f"\n{name} {info.dtype} {info.shape} {info.nbytes}\n".encode())
            digest.update(_sample(info))
        for path in sorted({info.file for info in self.tensors.values()}):
            digest.update(f"\n{path.name} {path.stat().st_size}".encode())
        return digest.hexdigest()

    def is_source_of(self, fingerprint: str) -> bool:
        """Whether `fingerprint` is this checkpoint's, or that of its config.json alone, of which plans can be made."""
        bare = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        return fingerprint in (self.fingerprint, bare.hexdigest())

    def check(self, file: Path) -> None:
        """Before a shard is read: hash it where the folder has a manifest, see `prismoe.folder.check_once`.

        Raises:
            InputError: it is not what was written.
        """
        if self._manifest is not None:
            check_once(self.folder, [file.name], manifest=self._manifest)

    def map(self, file: Path) -> mmap.mmap:
        """A shard as read-only memory; its pages belong to the page cache, not to us."""
        if file not in self._maps:
            self.check(file)
            with file.open("rb") as handle:
                self._maps[file] = mmap.mmap(handle.fileno(), 0, prot=mmap.PROT_READ)
        return self._maps[file]

    def array(self, key: str, *, rows: int | None = None) -> Array:
        """Tensor `key`, or its first `rows` alone, as a read-only view of its file (bfloat16 through ml_dtypes).

        Raises:
            InputError: there is no such tensor.
        """
        info = self.tensors.get(key)
        if info is None:
            raise InputError(f"no tensor {key!r}", where=str(self.folder), hint="the checkpoint is not of this family")
        flat = np.frombuffer(self.map(info.file), DTYPES[info.dtype], count=math.prod(info.shape), offset=info.start)
        return flat.reshape(info.shape)[:rows]

    def rows(self, name: str) -> Array:
        """The tensor that Llama would call `name`, wherever the family stores its rows."""
        at = self.places[name]
        return self.array(at.source)[at.start : at.start + at.shape[0]]

    def ffn(self, layer: int) -> FFN:
        """The feed-forward weights of one layer."""
        prefix = f"model.layers.{layer}.mlp"
        gate, up, down = (self.rows(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        return FFN(gate_FD=gate, up_FD=up, down_DF=down)


def _sample(info: TensorInfo) -> bytes:
    """The middle 4 KiB of a tensor, read without the read-ahead that would make it megabytes."""
    with info.file.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(info.start + max(0, info.nbytes - 4096) // 2)
        return file.read(min(4096, info.nbytes))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError("no config.json", where=str(folder), needed="a Hugging Face checkpoint folder")
    _check_inside(folder, path)
    where = str(path)
    config = read_json(path)
    # A layout that we read ourselves needs none of its code: see `prismoe/importing`.
    if config.get("auto_map") and config.get("model_type") not in OWN_READERS:
        raise InputError(
            "auto_map asks to run code from the folder",
            where=f"{where}: auto_map",
            hint="use a checkpoint of a stock architecture; remove the key only if the model code is stock",
        )
    refuse_code(config, where=where)
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise InputError(
            f"weights are quantised ({method})",
            where=f"{where}: quantization_config",
            needed="float32, bfloat16 or float16 weights",
            hint="convert the original checkpoint",
        )
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        _check_inside(folder, index)
        tensors = _from_index(folder, index)
    elif single.is_file():
        _check_inside(folder, single)
        tensors = read_header(single)[0]
    else:
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        if shards:
            raise InputError(f"{shards[0]} but no {INDEX}", where=str(folder), needed=f"{SINGLE} or {INDEX}")
        pickles = sorted(path.name for path in folder.iterdir() if _PICKLES.fullmatch(path.name))
        if pickles:
            raise InputError(
                f"only pickle weights ({pickles[0]})",
                where=str(folder),
                needed="safetensors",
                hint="a pickle can run code; save the model again with safe_serialization",
            )
        return {}
    for name, info in tensors.items():
        if info.dtype not in WEIGHT_DTYPES:
            raise InputError(f"dtype {info.dtype}", where=f"{info.file}: {name}", needed=" or ".join(WEIGHT_DTYPES))
    return tensors


def _from_index(folder: Path, index: Path) -> dict[str, TensorInfo]:
    where = str(index)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError("no weight_map", where=where)
    for key, name in weight_map.items():
        # A name with a separator, a drive or a parent could read any file on the machine.
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*\.safetensors", name):
            raise InputError(f"shard name {name!r}", where=f"{where}: {key}", needed="a plain file name *.safetensors")
    tensors: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if not path.is_file():
            raise InputError(f"shard {name} is missing", where=where, hint="fetch the checkpoint again")
        _check_inside(folder, path)
        for key, info in read_header(path)[0].items():
            if weight_map.get(key) != name:
                found = f"is in {name} but the index says {weight_map.get(key, 'nothing')}"
                raise InputError(found, where=f"{where}: {key}")
            tensors[key] = info
    for key, name in weight_map.items():
        if key not in tensors:
            raise InputError(f"is in the index but not in {name}", where=f"{where}: {key}")
    extra = {path.name for path in folder.glob("model-*-of-*.safetensors")} - set(weight_map.values())
    if extra:
        raise InputError(f"shard {min(extra)} is not in the index", where=where)
    return tensors


def _check_inside(folder: Path, path: Path) -> None:
    """Refuse a link that leads out of the checkpoint; the hub cache (snapshots/<rev> → blobs) is one checkpoint."""
    root, target = folder.resolve(), path.resolve()
    in_hub_cache = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if target.parent != root and not in_hub_cache:
        raise InputError(f"is a link to {target}", where=str(path), needed="a file inside the checkpoint folder")


def _from_hub(name: str, *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    try:
        return Path(
            snapshot_download(
                name,
                local_files_only=offline,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "LICEN*", "NOTICE*"],
            )
        )
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        why = "no such folder, and not in the hub cache" if offline else "no such folder, and the hub did not give it"
        raise InputError(why, where=name, hint="give a local checkpoint folder") from error
