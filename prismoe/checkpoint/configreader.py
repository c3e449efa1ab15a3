"""Typed access to a config.json that came from somewhere: every complaint names the file and the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismoe.errors import InputError

__all__ = ["ABSENT", "ConfigReader"]

ABSENT: Any = object()
"""Default of a key that must be there."""


class ConfigReader:
    """An untrusted JSON object. A key that is null reads as its default, as transformers has it."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def at(self, key: str) -> str:
        return f"{self.where}: {key}"

    def null(self, key: str) -> bool:
        """True where the key is there and null (absent means the family's default)."""
        return key in self.config and self.config[key] is None

    def refuse(self, key: str, accepted: tuple[Any, ...], needed: Any, why: str) -> None:
        value = self.config.get(key)
        if value is not None and value not in accepted:
            raise InputError(f"{value!r}", where=self.at(key), needed=f"{needed!r}", hint=why)

    def _value(self, key: str, default: Any, kinds: tuple[type, ...], needed: str) -> Any:
        value = self.config.get(key)
        if value is None:
            if default is ABSENT:
                raise InputError("missing", where=self.at(key), needed=needed)
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InputError(f"{value!r}"[:80], where=self.at(key), needed=needed)
        return value

    def count(self, key: str, default: Any = ABSENT, *, most: int = 2**31 - 1) -> int:
        value: int = self._value(key, default, (int,), "a positive whole number")
        if not 0 < value <= most:
            limit = f", at most {most}" if value > 0 else ""
            raise InputError(f"{value}"[:80], where=self.at(key), needed=f"a positive whole number{limit}")
        return value

    def real(self, key: str, default: Any) -> Any:
        value = self._value(key, default, (int, float), "a number")
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"{value}", where=self.at(key), needed="a finite number, not negative")
        return None if value is None else float(value)

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._value(key, default, (bool,), "true or false"))

    def text(self, key: str) -> str | None:
        value: str | None = self._value(key, None, (str,), "text")
        return value

    def table(self, key: str) -> dict[str, Any] | None:
        value: dict[str, Any] | None = self._value(key, None, (dict,), "an object or null")
        return value

    def token(self, key: str) -> int | None:
        value: int | None = self._value(key, None, (int,), "a token id or null")
        return value

    def tokens(self, key: str) -> int | list[int] | None:
        value: int | list[int] | None = self._value(key, None, (int, list), "a token id, a list of them or null")
        if isinstance(value, list) and not all(type(item) is int for item in value):
            raise InputError(f"{value!r}"[:80], where=self.at(key), needed="token ids")
        return value
