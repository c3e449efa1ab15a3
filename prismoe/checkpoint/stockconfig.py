"""What a stranger's config.json may not ask of the stock library: code from elsewhere, or memory without bound."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError

if TYPE_CHECKING:
    from prismoe.checkpoint import Checkpoint

__all__ = ["check_sizes", "refuse_code"]

# The library lets a config choose how it computes; names with an owner are fetched from the hub and run.
_CHOOSES = re.compile(r"_?(attn|experts|moe|kernel)\w*implementation\w*|\w*kernels?(_config)?", re.IGNORECASE)
_OURS = ("eager", "sdpa")
_SIZES = re.compile(r"(num|n)_\w+|\w*(hidden|intermediate|vocab|head)_(size|dim)")
MAX_DEPTH = 20


def refuse_code(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse `auto_map` below the top and kernels that are chosen by name, wherever they stand.

    Raises:
        InputError: naming the field.
    """
    for path, key, value in _fields(config, "", where):
        if key == "auto_map" and value and path != key:
            raise InputError("asks to run code from the folder", where=f"{where}: {path}")
        chosen = value if isinstance(value, list) else list(value.values()) if isinstance(value, dict) else [value]
        if _CHOOSES.fullmatch(key) and any(name not in (None, False, True, *_OURS) for name in chosen):
            raise InputError(
                f"{value!r}"[:80], where=f"{where}: {path}", needed=" or ".join(_OURS), hint="remove the field"
            )


def _fields(table: Mapping[str, Any], at: str, where: str, depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    if depth > MAX_DEPTH:
        raise InputError(f"nested deeper than {MAX_DEPTH} levels", where=f"{where}: {at[:80]}")
    for key, value in table.items():
        path = f"{at}.{key}" if at else key
        yield path, key, value
        if isinstance(value, dict):
            yield from _fields(value, path, where, depth + 1)


def check_sizes(checkpoint: Checkpoint) -> None:
    """Before a model is built: no layer, expert or channel that the files could not hold.

    Raises:
        InputError: no weights, or a count in config.json that is larger than anything in the files.
    """
    where = str(checkpoint.folder / "config.json")
    if not checkpoint.has_weights:
        raise InputError("no weights", where=str(checkpoint.folder), needed="model.safetensors")
    sides = [side for info in checkpoint.tensors.values() for side in info.shape]
    most = max([len(checkpoint.tensors), *sides])
    for path, key, value in _fields(checkpoint.config, "", where):
        if isinstance(value, int | float) and _SIZES.fullmatch(key) and not -1 <= value <= most:
            raise InputError(f"{value!r}"[:80], where=f"{where}: {path}", needed=f"at most {most}, as in the files")
