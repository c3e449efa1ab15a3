"""Located values bound to frozen dataclasses: every wrong or missing name and value becomes one line of `problems`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from prismoe.config.located import Located, plain
from prismoe.errors import UsageError

__all__ = ["Binder"]


class Binder:
    """Collects problems over a whole config, so that a person sees all of them at once.

    `known` are the dotted names of the whole schema: a key that stands in the wrong section is told where it belongs.
    """

    def __init__(self, known: typing.Iterable[str]) -> None:
        self.known = sorted(known)
        self.problems: list[str] = []

    def problem(self, where: str, found: str, needed: str = "", hint: str = "") -> None:
        """Note one problem, in the form of every error line."""
        line = f"{where}: {found}" + (f"; needed {needed}" if needed else "") + (f" (hint: {hint})" if hint else "")
        self.problems.append(line)

    def keys(self, at: Located, path: str, allowed: typing.Iterable[str]) -> dict[str, Located]:
        """The mapping at `at` (nothing counts as empty), unknown keys reported and left out."""
        value = {} if at.value is None else at.value
        if not isinstance(value, dict):
            self.problem(at.where, f"{path or 'config'} is {_show(at)}", "a section with keys below it")
            return {}
        allowed = sorted(allowed)
        for key in value:
            if key in allowed:
                continue
            name = f"{path}.{key}" if path else key
            self.problem(value[key].where, f"unknown key {name}", hint=self._suggest(key, path, allowed))
        return {key: child for key, child in value.items() if key in allowed}

    def check(self, at: Located, path: str, hint: Any) -> Any:
        """The value at `at` as type `hint` (strict: text is not a number), or None after noting the problem."""
        try:
            adapter = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False))
            # JSON is pydantic's strict mode that still reads a list as a tuple.
            return adapter.validate_json(json.dumps(plain(at)), strict=True)
        except ValidationError as error:
            deepest = max(_follow(at, path, problem["loc"])[2] for problem in error.errors(include_url=False))
            for problem in error.errors(include_url=False):
                found, name, depth = _follow(at, path, problem["loc"])
                if depth == deepest:
                    break
            needed = dict.fromkeys(
                _phrase(problem["type"], problem["msg"], problem.get("ctx", {}))
                for problem in error.errors(include_url=False)
                if _follow(at, path, problem["loc"])[1] == name
            )
            self.problem(found.where, f"{name} is {_show(found)}", " or ".join(needed))
            return None

    def record(
        self, cls: Any, at: Located, path: str, types_of: Mapping[str, Any] | None = None, *, without: str = ""
    ) -> Any:
        """An instance of the dataclass `cls` from the mapping at `at`; nested dataclasses are bound the same way.

        `types_of` are extra keys with their types (a method's own arguments); they arrive in the field
        `arguments`. The field `without` is not for a config.
        Returns None when there was a problem.
        """
        before = len(self.problems)
        hints = typing.get_type_hints(cls, include_extras=True)
        extra = dict(types_of or {})
        fields = {item.name: item for item in dataclasses.fields(cls) if item.name not in ("arguments", without)}
        given = self.keys(at, path, [*fields, *extra])
        values: dict[str, Any] = {}
        for name, item in fields.items():
            if name in given:
                values[name] = self.value(given[name], f"{path}.{name}" if path else name, hints[name])
            elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
                self.problem(at.where, f"{path}.{name} is missing" if path else f"{name} is missing")
        arguments = {name: self.check(given[name], f"{path}.{name}", extra[name]) for name in extra if name in given}
        if len(self.problems) > before:
            return None
        try:
            return cls(**values, **({"arguments": arguments} if types_of is not None else {}))
        except UsageError as error:  # values that are right one by one but not together
            name = error.where.rpartition(".")[2]
            self.problems.append(f"{given[name].where if name in given else at.where}: {error}")
            return None

    def value(self, at: Located, path: str, hint: Any) -> Any:
        """The value at `at` for a field of type `hint`: plain, a dataclass, an optional one, or a dict of them."""
        bare = typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint
        if typing.get_origin(bare) in (types.UnionType, typing.Union):
            records = [option for option in typing.get_args(bare) if dataclasses.is_dataclass(option)]
            if records:
                return None if at.value is None else self.value(at, path, records[0])
        if dataclasses.is_dataclass(bare):
            return self.record(typing.cast(type, bare), at, path)
        if typing.get_origin(bare) is dict and dataclasses.is_dataclass(item := typing.get_args(bare)[1]):
            if not isinstance(at.value, dict) or not at.value:
                self.problem(at.where, f"{path} is {_show(at)}", "at least one name with its keys below it")
                return None
            return {key: self.record(item, child, f"{path}.{key}") for key, child in at.value.items()}
        return self.check(at, path, hint)

    def _suggest(self, key: str, path: str, allowed: list[str]) -> str:
        here = f"{path}.{key}" if path else key
        elsewhere = [name for name in self.known if name.rpartition(".")[2] == key and name != here]
        if elsewhere:
            return f"did you mean {elsewhere[0]}?"
        close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.6)
        if close:
            return f"did you mean {close[0]}?"
        return f"known here: {', '.join(allowed)}" if len(allowed) <= 12 else "see prismoe VERB --help"


_NEEDED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "none_required": "nothing",
    "literal_error": "{expected}",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "missing": "one more value",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
}


def _phrase(kind: str, message: str, context: Mapping[str, Any]) -> str:
    return _NEEDED.get(kind, message.removeprefix("Input should be ")).format(**context)


def _show(at: Located) -> str:
    if at.value is None:
        return "empty"
    text = json.dumps(plain(at), ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _follow(at: Located, path: str, steps: Sequence[str | int]) -> tuple[Located, str, int]:
    """The value inside `at` that a pydantic location names, its dotted name, and how deep it lies."""
    depth = 0
    for step in steps:  # union branches add steps of their own, which name nothing here
        if isinstance(at.value, dict) and isinstance(step, str) and step in at.value:
            at, path, depth = at.value[step], f"{path}.{step}", depth + 1
        elif isinstance(at.value, list) and isinstance(step, int) and step < len(at.value):
            at, path, depth = at.value[step], f"{path}[{step}]", depth + 1
    return at, path, depth
