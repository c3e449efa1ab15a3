"""Training state on disk: PyTorch's distributed checkpoint in safetensors, its meaning in JSON; never a pickle.

One folder per checkpoint, `step-00000100/`, complete when its manifest is there. Every process writes what it holds
into a file of its own; a header says where in the whole each piece lies, so any other number of processes can read
it. There is no RNG state to keep: batches and every draw of a step are functions of (seed, step).
(When they are written, and that training does not wait for it: `saving.py`.)
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from prismoe.errors import InputError, ResourceError
from prismoe.folder import FileEntry, Manifest, make_folder, sha256_file, write_json_atomic
from prismoe.room import unwritten
from prismoe.train.engine import Engine
from prismoe.train.routers import Policy

__all__ = ["latest", "prune", "require_room", "restore", "save", "tensors_of"]

_NAME = re.compile(r"step-(\d{8,})")
_STATE = "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save(folder: Path, *, step: int, engine: Engine, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
    """Write checkpoint `step` under `folder`; `state` is JSON and comes back from `restore`. Kept if already there.

    `tensors` are those of `tensors_of` or copies of them, and must not change meanwhile.

    Raises:
        ResourceError: the disk is full or not writable; checkpoints that were there before still are.
    """
    target = folder / f"step-{step:08d}"
    engine.at("saving", step)
    if engine.from_first(Manifest.read(target) is not None):
        return target
    with _written(target, _bytes(tensors)):
        if engine.first:
            shutil.rmtree(target, ignore_errors=True)
            make_folder(target)
        engine.barrier("saving")
        # One process alone is what was asked for. (In a thread, filters cannot be put back without losing others'.)
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_tensors(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(target), save_distributed=True),
            process_group=engine.control,
            no_dist=engine.world == 1,
        )
        if engine.first:
            write_json_atomic(target / _STATE, state)
        engine.barrier("hashing what was saved")
        names = sorted(path.name for path in target.iterdir() if path.name != "manifest.json")
        files = _hashed(target, names, engine)
        if engine.first:
            Manifest(kind="training-state", parents={}, config={"step": step}, files=files).write(target)
    engine.barrier("saved")
    return target


def latest(folder: Path, engine: Engine) -> Path | None:
    """The newest complete checkpoint under `folder`, as rank 0 sees it."""
    complete = _complete(folder)
    step = engine.from_first(int(complete[-1].name[5:]) if complete else -1)
    return folder / f"step-{step:08d}" if step >= 0 else None


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the `keep` newest complete checkpoints, and every incomplete one."""
    complete = _complete(folder)
    kept = set(complete[len(complete) - min(keep, len(complete)) :])
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path not in kept:
            # The manifest goes first: a half-removed checkpoint must not look complete.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path)


def restore(
    path: Path, *, engine: Engine, model: torch.nn.Module, policy: Policy, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put weights, router policy and optimizer state of checkpoint `path` back in place; returns `state`.

    Raises:
        InputError: a file is damaged, or does not fit the model.
    """
    engine.at("reading a checkpoint")
    manifest = Manifest.read(path)
    if manifest is None:
        raise InputError("not a complete checkpoint", where=str(path), hint="is it on a disk that all ranks see?")
    mine = {name: entry for number, (name, entry) in enumerate(sorted(manifest.files.items())) if _ours(number, engine)}
    Manifest(kind=manifest.kind, parents={}, config={}, files=mine).check(path)
    wanted = tensors_of(model, policy, optimizer)
    reader = HuggingFaceStorageReader(str(path))
    with _quiet():
        found = reader.read_metadata().state_dict_metadata.items()
        stored = {name: tuple(info.size) for name, info in found if isinstance(info, TensorStorageMetadata)}
        needed = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        if different := sorted(set(stored.items()) ^ set(needed.items())):
            name = different[0][0]
            what = f"{name} is {_shape(stored.get(name))}"
            raise InputError(what, where=str(path), needed=f"{_shape(needed.get(name))}, as in the model")
        load_tensors(
            wanted,
            storage_reader=HuggingFaceStorageReader(str(path)),
            process_group=engine.control,
            no_dist=engine.world == 1,
        )
    state: dict[str, Any] = json.loads((path / _STATE).read_bytes())
    return state


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else f"of shape {list(shape)}"


def _complete(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted((path for path in found if Manifest.read(path) is not None), key=lambda path: int(path.name[5:]))


def _ours(number: int, engine: Engine) -> bool:
    """Files are read and hashed in turns: each by one process."""
    return number % engine.world == engine.rank


def _hashed(folder: Path, names: list[str], engine: Engine) -> dict[str, FileEntry]:
    """Manifest entries of `names`, the same in every process."""
    digests = torch.zeros(len(names), 32, dtype=torch.int64)
    for number, name in enumerate(names):
        if _ours(number, engine):
            digests[number] = torch.tensor(list(bytes.fromhex(sha256_file(folder / name))))
    if engine.world > 1:
        digests = engine.gather(digests).sum(dim=0)
    sizes = [(folder / name).stat().st_size for name in names]
    return {
        name: {"sha256": bytes(digest).hex(), "bytes": size}
        for name, digest, size in zip(names, digests.tolist(), sizes, strict=True)
    }


def require_room(folder: Path, tensors: dict[str, torch.Tensor], engine: Engine) -> None:
    """Refuse a checkpoint of `tensors` that the disk of `folder` cannot hold, in every process alike.

    Raises:
        ResourceError: what is free and what is needed.
    """
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    needed = _bytes(tensors)
    free = engine.from_first(shutil.disk_usage(existing).free)
    if needed + (1 << 20) > free:
        raise ResourceError(
            f"{free / 1e9:.1f} GB of disk free",
            where=str(folder),
            needed=f"{needed / 1e9:.1f} GB for this checkpoint",
            hint="the last one is whole: free some space and give the same command again",
        )


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@contextmanager
def _written(target: Path, size: int) -> Iterator[None]:
    """What goes wrong with a disk while `size` bytes are written, in the words of our errors."""
    try:
        yield
    except OSError as error:
        raise unwritten(target, error, size=size) from error
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise unwritten(target, reason, size=size) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors_of(model: torch.nn.Module, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor that training changes, by name; a tied weight counts once. Views, not copies."""
    return dict(_tensors(model, policy, optimizer))


def _tensors(
    model: torch.nn.Module, policy: Policy, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
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
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state |= {name: torch.zeros_like(parameter) for name in _MOMENTS[1:]}
    return {name: state[name] for name in _MOMENTS}
