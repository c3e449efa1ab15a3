"""Stock models in, stock folders out."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from prismoe.checkpoint import Checkpoint
from prismoe.errors import InputError, NumericalError, ResourceError
from prismoe.folder import fsync_folder, write_atomic

__all__ = ["load_model", "random_model", "save_model", "stored_dtype"]

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
        InputError: a tensor is missing, left over or of the wrong shape, or the architecture is not stock.
    """
    try:
        with _quiet_library():
            model, report = AutoModelForCausalLM.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
            )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise InputError(f"cannot be loaded ({_first_line(error)})", where=str(folder)) from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            name = sorted(str(key) for key in report[what])[0]
            raise InputError(f"{what.replace('_', ' ')}: {len(report[what])}, such as {name}", where=str(folder))
    return model


def random_model(folder: Path, *, seed: int) -> Any:
    """The stock causal-LM class described by `folder/config.json`, weights drawn by the class's own rule, in float32.

    Raises:
        InputError: the architecture is not stock.
    """
    try:
        with _quiet_library(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"no model for this config ({_first_line(error)})", where=str(folder)) from error


def stored_dtype(source: Checkpoint) -> torch.dtype:
    """The dtype weights are saved in: that of most bytes of the source, or what its config says when it has none."""
    if source.has_weights:
        size: dict[str, int] = {}
        for info in source.tensors.values():
            size[info.dtype] = size.get(info.dtype, 0) + info.nbytes
        return _DTYPES[max(size, key=lambda name: size[name])]
    name = source.config.get("dtype") or source.config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r}", where=str(source.folder / "config.json"), needed="float32 or bfloat16")
    return _DTYPES[name]


def save_model(model: Any, source: Checkpoint, out: Path) -> list[str]:
    """Write `model` as a stock folder: the hub's tensor names, and config and side files of `source` byte for byte.

    The library's own writer turns fused experts back into per-expert tensors, but its config.json is readable by new
    versions only; the source's config describes the same model, so it is carried over. The folder is read back and
    compared with the model, tensor by tensor.

    Returns the names of the files.

    Raises:
        NumericalError: a weight is not finite, or what was written is not what the model holds.
        ResourceError: the disk is full or not writable.
    """
    dtype = stored_dtype(source)
    shutil.rmtree(out, ignore_errors=True)
    state = _cast(model, dtype)
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise NumericalError("has a value that is not finite", where=name, hint="lower lr; nothing was saved")
    try:
        with _quiet_library():
            model.save_pretrained(out, state_dict=state, max_shard_size="5GB")
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"cannot write: {error}", where=str(out)) from error
    shards = sorted(path.name for path in out.glob("*.safetensors*"))
    for path in out.iterdir():
        if path.name not in shards:
            path.unlink()
    side_files = {path.name: path.read_bytes() for path in source.side_files}
    side_files["config.json"] = (source.folder / "config.json").read_bytes()
    for name, data in side_files.items():
        write_atomic(out / name, data)
    fsync_folder(out)
    _check_written(state, source, out, dtype)
    return sorted([*shards, *side_files])


def _cast(model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state dict in `dtype`; tensors that share memory keep sharing it, so that a tied weight is written once."""
    cast: dict[int, torch.Tensor] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in cast:
            cast[tensor.data_ptr()] = tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
        state[name] = cast[tensor.data_ptr()]
    return state


def _check_written(state: dict[str, torch.Tensor], source: Checkpoint, out: Path, dtype: torch.dtype) -> None:
    written = Checkpoint.open(out)
    if source.has_weights:
        shapes = {name: info.shape for name, info in source.tensors.items()}
        found = {name: info.shape for name, info in written.tensors.items()}
        if different := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
            raise NumericalError("tensors written differ from the source's", where=f"{out}: {different[0]}")
    reread = load_model(out, dtype=dtype).state_dict()
    for name, tensor in state.items():
        if not torch.equal(reread[name], tensor):
            raise NumericalError("read back differently from what was trained", where=f"{out}: {name}")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
