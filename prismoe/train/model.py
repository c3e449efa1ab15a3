"""Stock models in, stock folders out, whole or sharded over processes."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.stockconfig import check_sizes
from prismoe.convert.gather import Gatherer
from prismoe.convert.stream import INDEX
from prismoe.errors import InputError, NumericalError
from prismoe.folder import check_once, fsync_folder, write_atomic, write_json_atomic
from prismoe.room import unwritten
from prismoe.train.compiling import compile_layers
from prismoe.train.engine import Engine
from prismoe.train.engine.placement import materialise, place
from prismoe.train.experts import use_experts
from prismoe.train.origin import Origin
from prismoe.train.weights import Place, Reader, fill, held, places, stored

__all__ = ["empty_model", "load_model", "place_model", "save_model"]

_SHARD_BYTES = 5_000_000_000

_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@contextmanager
def _quiet_library() -> Iterator[None]:
    """Modules never print; what the library has to say about a load is checked, not read."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The stock causal-LM class with the weights of `folder`, in `dtype`, remote code off, no socket.

    Raises:
        InputError: a tensor is missing, left over or of the wrong shape, the architecture is not stock, or a file is
            not what its manifest says.
    """
    check_sizes(Checkpoint.open(folder))
    check_once(folder)
    try:
        with _quiet_library():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # each field's validator and each class has an exception of its own
        raise InputError(f"cannot be loaded ({_first_line(error)})", where=str(folder)) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            name = sorted(str(key) for key in report[what])[0]
            raise InputError(f"{what.replace('_', ' ')}: {len(report[what])}, such as {name}", where=str(folder))
    return model


def empty_model(config: Mapping[str, Any], *, where: str) -> Any:
    """The stock causal-LM class that `config` describes, in float32 on the meta device: shapes, no memory.

    Raises:
        InputError: the architecture is not stock.
    """
    with torch.device("meta"):
        return _from_config(config, where)


def _from_config(config: Mapping[str, Any], where: str) -> Any:
    try:
        with _quiet_library():
            settings = CONFIG_MAPPING[config["model_type"]].from_dict(
                deepcopy(dict(config))
            )  # it adds to what lies inside
            return AutoModelForCausalLM.from_config(settings, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"no model for this config ({_first_line(error)})", where=where) from error


def place_model(
    origin: Origin,
    engine: Engine,
    *,
    seed: int | None = None,
    bf16: bool = False,
    recompute: bool = False,
    experts: str = "auto",
    compiled: bool = False,
) -> Any:
    """The model of `origin` in float32, this process holding its part: read from the folder, or drawn with `seed`.

    With `recompute` it computes the activations of each layer a second time instead of keeping them; `experts` says
    how those of a mixture compute (see `train.experts`), and layers may be `compiled` (see `train.compiling`).

    Weights are drawn whole by rank 0, which is what makes them the same for any number of processes, and sent from it
    one tensor at a time.

    Raises:
        InputError: a tensor is missing, left over, of the wrong shape or not finite, or the architecture is not stock.
        UsageError: `experts` does not allow the sizes or the device.
    """
    where = str(origin.checkpoint.folder)
    drawn = _drawn(origin, seed, where) if seed is not None and engine.first else None
    alone = engine.world == 1
    model = drawn if drawn is not None and alone else empty_model(origin.config, where=where)
    use_experts(model, experts, device=engine.device)
    if recompute:
        _keep_no_activations(model)
    if compiled:
        compile_layers(model, device=engine.device)
    model = place(model, engine, bf16=bf16)
    if seed is not None:
        if not alone:
            materialise(model, engine.device)
            _send(drawn, model, engine)
        return model
    with Gatherer.reading(origin.checkpoint) as gatherer, torch.no_grad():
        materialise(model, engine.device)
        shapes = {key: shape for key, (_, shape) in origin.tensors().items()}
        fill(model, Reader(origin.checkpoint, origin.recipes, gatherer), shapes)
    return model


def _drawn(origin: Origin, seed: int, where: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _from_config(origin.config, where)


@torch.no_grad()
def _send(drawn: Any, model: Any, engine: Engine) -> None:
    """What this process holds of each tensor of `drawn`, the model that rank 0 has whole."""
    whole = stored(drawn) if drawn is not None else {}
    for name, tensor in stored(model).items():
        local, part = held(tensor)
        sent = engine.send(whole[name] if drawn is not None else torch.empty(tensor.shape, dtype=tensor.dtype))
        local.copy_(sent[part])


def _keep_no_activations(model: Any) -> None:
    # The first name is that of newer versions of the library, the second of those before.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def save_model(model: Any, origin: Origin, out: Path, *, engine: Engine) -> list[str]:
    """Write `model` as a stock folder: the hub's tensor names in the dtypes of `origin`, its config and side files.

    Rank 0 writes, one shard at a time; every tensor is read back and compared with what the model holds.

    Returns the names of the files.

    Raises:
        NumericalError: a weight is not finite, or what was written is not what the model holds.
        ResourceError: the disk is full or not writable.
    """
    engine.at("writing the model")
    tensors, found = stored(model), places(model)
    for name, tensor in tensors.items():
        if engine.any(not bool(torch.isfinite(held(tensor)[0]).all())):
            raise NumericalError("has a value that is not finite", where=name, hint="lower lr; nothing was saved")
    dtypes = _dtypes(model, origin, found)
    inside: dict[str, dict[str, Place]] = {}
    for key, where in found.items():
        inside.setdefault(where.name, {})[key] = where
    groups = _groups({name: tensors[name].numel() * dtypes[next(iter(keys))].itemsize for name, keys in inside.items()})
    if engine.first:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
    index: dict[str, str] = {}
    total = 0
    for number, group in enumerate(groups, start=1):
        shard = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        parts: dict[str, torch.Tensor] = {}
        for name in group:
            whole = _whole(tensors[name])
            if engine.first:
                parts |= {key: at.of(whole).to("cpu", dtypes[key]).contiguous() for key, at in inside[name].items()}
        if engine.first:
            _write_shard(parts, out / shard)
            index |= dict.fromkeys(parts, shard)
            total += sum(tensor.nbytes for tensor in parts.values())
    files = {**origin.files, "config.json": origin.config_bytes}
    if engine.first:
        for name, data in files.items():
            write_atomic(out / name, data)
        if len(groups) > 1:
            write_json_atomic(out / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
        fsync_folder(out)
    return sorted([*set(index.values()), *files, *([INDEX] if len(groups) > 1 else [])])


def _write_shard(parts: dict[str, torch.Tensor], path: Path) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(parts, partial, metadata={"format": "pt"})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error, size=sum(tensor.nbytes for tensor in parts.values())) from error
    with safe_open(path, framework="pt") as file:
        for key, tensor in parts.items():
            if not torch.equal(file.get_tensor(key), tensor):
                raise NumericalError("read back differently from what was trained", where=f"{path}: {key}")


@torch.no_grad()
def _whole(tensor: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach()


def _dtypes(model: Any, origin: Origin, found: Mapping[str, Place]) -> dict[str, torch.dtype]:
    """Every tensor keeps the dtype of the folder it came from, or has what the config says when there was none.

    What the stock class keeps in float32 in any case (selection biases, which move by 1e-3 a step) is saved so.
    """
    named = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    wide = {key: torch.float32 for key in found if any(f".{name}." in f".{key}." for name in named)}
    if origin.recipes:
        made = origin.tensors()
        return {key: _DTYPES[made[key][0]] for key in found} | wide
    name = origin.config.get("dtype") or origin.config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        where = str(origin.checkpoint.folder / "config.json")
        raise InputError(f"dtype {name!r}", where=where, needed="float32 or bfloat16")
    return dict.fromkeys(found, _DTYPES[name]) | wide


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Consecutive parameters of a shard's size; a larger one has its own."""
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > _SHARD_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
