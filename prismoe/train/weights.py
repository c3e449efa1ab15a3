"""Between the tensors of a folder and the parameters of a stock class: which is which, read and written in parts.

A stock class may keep all experts of a layer in one parameter that its folder stores expert by expert. The library can
turn a state dict of the one into the other; here it does so once, on a few numbers instead of weights, and the answer
says where every tensor of the folder lies in the parameters. So each process reads exactly the rows it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.tensorfile import DTYPES
from prismoe.convert.gather import Gatherer
from prismoe.convert.layout import lay_out, recipe_tensor
from prismoe.errors import InputError
from prismoe.recipe import Recipe

__all__ = ["Place", "Reader", "fill", "held", "places", "stored"]

_STRIDE = 1 << 20  # above twice the number of experts of a layer


@dataclass(frozen=True)
class Place:
    """Where a tensor of the folder lies: in parameter `name`, all of it or (`expert`, `half`) of it.

    `half` is 0 or 1 where gate and up are laid one below the other, else None.
    """

    name: str
    expert: int | None = None
    half: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of a whole parameter, as a view."""
        if self.expert is None:
            return parameter
        rows = parameter[self.expert]
        return rows if self.half is None else rows.chunk(2, dim=0)[self.half]


def stored(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name; a tied weight once, where it is first."""
    persistent = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return {**dict(model.named_parameters()), **buffers}


def places(model: Any) -> dict[str, Place]:
    """Every tensor that the folder of `model` holds, by its name there; a tied weight stands where it is first.

    Raises:
        InputError: the class stores its weights in a way that is neither whole tensors nor experts one by one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = stored(model)
    names = list(tensors)
    probes = {}
    for number, (name, parameter) in enumerate(tensors.items()):
        experts = parameter.shape[0] if parameter.ndim == 3 else 0
        shape = (experts, 2, 1) if experts else (1,) * parameter.ndim
        probes[name] = number * _STRIDE + torch.arange(2 * experts or 1).view(shape)
    found = {}
    for key, probe in revert_weight_conversion(model, probes).items():
        numbers = probe.flatten().tolist()
        number, first = divmod(numbers[0], _STRIDE)
        whole = probes[names[number]].flatten().tolist()
        if numbers == whole:
            found[key] = Place(names[number])
        elif numbers in ([whole[first]], whole[first : first + 2]):
            found[key] = Place(names[number], first // 2, first % 2 if len(numbers) == 1 else None)
        else:
            raise InputError(f"{key} is stored in a way we do not know", where=str(model.config.model_type))
    return found


class Reader:
    """Rows of tensors as recipes make them from a checkpoint: nothing is made that was not asked for."""

    def __init__(self, checkpoint: Checkpoint, recipes: Mapping[str, Recipe], gatherer: Gatherer) -> None:
        self._checkpoint, self._recipes, self._gatherer = checkpoint, recipes, gatherer

    def rows(self, key: str, rows: slice = slice(None)) -> torch.Tensor:
        """Rows `rows` of tensor `key` in the dtype of the folder.

        Raises:
            InputError: NaN or infinity in the source.
        """
        recipe, tensors = self._recipes[key], self._checkpoint.tensors
        dtype, shape = recipe_tensor(recipe, tensors, key=key)
        first, last, _ = rows.indices(shape[0])
        (shard,) = lay_out({key: recipe}, tensors, max_shard_bytes=1 << 62)
        header = len(shard.header)
        row_bytes = (shard.nbytes - header) // shape[0]
        low, high = first * row_bytes, last * row_bytes
        data = bytearray(high - low)
        for piece in shard.pieces:
            start = piece.start - header
            begin, end = max(low, start), min(high, start + piece.nbytes)
            if begin < end:
                window = memoryview(data)[begin - low : end - low]
                self._gatherer.fill(piece, begin - start, end - start, window)
        array = np.frombuffer(data, DTYPES[dtype]).reshape(last - first, *shape[1:])
        return _tensor(array)


def _tensor(array: np.ndarray[Any, Any]) -> torch.Tensor:
    if array.dtype.name == "bfloat16":  # NumPy knows it through ml_dtypes, torch does not know that
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def held(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """What this process holds of a parameter, and which part of the whole it is, axis by axis."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return tensor.detach(), tuple(slice(0, size) for size in tensor.shape)
    (chunk,) = tensor.__create_chunk_list__()
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    sides = zip(chunk.offsets, chunk.sizes, strict=True)
    return local.detach(), tuple(slice(first, first + size) for first, size in sides)


@torch.no_grad()
def fill(model: Any, reader: Reader, keys: Mapping[str, tuple[int, ...]]) -> None:
    """Read what this process holds of every parameter; `keys` are the tensors of the folder with their shapes.

    Raises:
        InputError: a tensor is missing, left over or of the wrong shape.
    """
    where = str(reader._checkpoint.folder)
    expected = places(model)
    tensors = stored(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if left := sorted(keys.keys() - expected.keys() - tied):
        raise InputError(f"tensors left over: {len(left)}, such as {left[0]}", where=where)
    if missing := sorted(expected.keys() - keys.keys()):
        raise InputError(f"tensors missing: {len(missing)}, such as {missing[0]}", where=where)
    for key, place in expected.items():
        needed = tuple(place.of(torch.empty(tensors[place.name].shape, device="meta")).shape)
        if tuple(keys[key]) != needed:
            raise InputError(f"{key} of shape {list(keys[key])}", where=where, needed=str(list(needed)))
    for key, place in expected.items():
        local, (rows, *inside) = held(tensors[place.name])
        if not local.numel():
            continue
        if place.expert is None:
            local.copy_(reader.rows(key, rows)[(slice(None), *inside)])
        elif rows.start <= place.expert < rows.stop:
            # Its own rows within the expert, less those that another process holds.
            start = keys[key][0] * (place.half or 0)
            low, high = max(inside[0].start, start), min(inside[0].stop, start + keys[key][0])
            if low < high:
                mine = local[place.expert - rows.start, low - inside[0].start : high - inside[0].start]
                mine.copy_(reader.rows(key, slice(low - start, high - start)))
