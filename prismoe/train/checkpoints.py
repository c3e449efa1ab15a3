"""Training state on disk: weights, optimizer moments and counters in safetensors and JSON; never a pickle.

One folder per checkpoint, `step-00000100/`, complete when its manifest is there. There is no RNG state to keep:
batches and every draw of a step are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prismoe.errors import InputError, ResourceError
from prismoe.folder import Manifest, fsync_folder, hash_files, write_json_atomic
from prismoe.train.routers import Policy

__all__ = ["latest", "prune", "restore", "save"]

_NAME = re.compile(r"step-(\d{8,})")
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(
    folder: Path,
    *,
    step: int,
    model: torch.nn.Module,
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> Path:
    """Write checkpoint `step` under `folder`; `state` is JSON and comes back from `restore`. Kept if already there.

    Raises:
        ResourceError: the disk is full or not writable.
    """
    target = folder / f"step-{step:08d}"
    if Manifest.read(target) is not None:
        return target
    try:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        path = target / "state.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in _tensors(model, policy, optimizer)}, path)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise ResourceError(f"cannot write: {error}", where=str(target)) from error
    write_json_atomic(target / "state.json", state)
    fsync_folder(folder)
    files = hash_files(target, ["state.json", "state.safetensors"])
    Manifest(kind="training-state", parents={}, config={"step": step}, files=files).write(target)
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under `folder`."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the `keep` newest complete checkpoints, and every incomplete one."""
    complete = _complete(folder)
    kept = set(complete[len(complete) - min(keep, len(complete)) :])
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path not in kept:
            # The manifest goes first: a half-removed checkpoint must not look complete.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)


def restore(path: Path, *, model: torch.nn.Module, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put weights, router policy and optimizer state of checkpoint `path` back in place; returns `state`.

    Raises:
        InputError: a file is damaged, or does not fit the model.
    """
    manifest = Manifest.read(path)
    assert manifest is not None, "restore is given complete checkpoints"
    manifest.check(path)
    wanted = dict(_tensors(model, policy, optimizer))
    with safe_open(path / "state.safetensors", framework="pt") as file, torch.no_grad():
        if different := sorted(set(file.keys()) ^ set(wanted)):
            raise InputError(f"{different[0]} is in only one of them", where=str(path), needed="the model's tensors")
        for name, tensor in wanted.items():
            tensor.copy_(file.get_tensor(name))
    state: dict[str, Any] = json.loads((path / "state.json").read_bytes())
    return state


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if Manifest.read(path) is not None), key=lambda path: int(path.name[5:]))


def _tensors(
    model: torch.nn.Module, policy: Policy, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor that training changes, by name; a tied weight counts once. Views, not copies."""
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield f"model.{name}", buffer
    for name, tensor in policy.state().items():
        yield f"policy.{name}", tensor
    trained = {f"model.{name}": parameter for name, parameter in model.named_parameters()}
    trained |= {f"policy.{name}": parameter for name, parameter in policy.parameters().items()}
    for name, parameter in trained.items():
        yield name, parameter.detach()
        for moment, tensor in _moments(optimizer, parameter).items():
            yield f"{moment}.{name.removeprefix('model.')}", tensor


def _moments(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
    """AdamW's state; what it starts from (zeros) where the parameter had no gradient yet, being frozen or held back."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state |= {name: torch.zeros_like(parameter) for name in _MOMENTS[1:]}
    return {name: state[name] for name in _MOMENTS}
