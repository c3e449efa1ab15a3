"""A folder is a registry: a file's name is the name of what it offers, a function's keyword signature is its schema."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from prismoe.errors import UsageError

__all__ = ["arguments", "keywords", "load", "names", "suggestion"]


def names(package: str) -> tuple[str, ...]:
    """Sorted names of the files in `package` (a dotted name), without loading them."""
    folder = importlib.import_module(package)
    return tuple(sorted(found.name for found in pkgutil.iter_modules(folder.__path__) if found.name[0] != "_"))


def load(package: str, name: str, *, where: str) -> ModuleType:
    """The file called `name`; only names that are in the folder are ever imported.

    Raises:
        UsageError: no such file, with the nearest name.
    """
    known = names(package)
    if name not in known:
        raise UsageError(
            f"unknown {name!r}", where=where, needed="one of " + ", ".join(known), hint=suggestion(name, known)
        )
    return importlib.import_module(f"{package}.{name}")


def arguments(function: Callable[..., Any], given: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """`given` checked against the keyword-only parameters of `function`, defaults filled in.

    Types are strict: text is not a number, and true is not 1.

    Raises:
        UsageError: unknown, missing or wrong arguments, all of them in one line.
    """
    from pydantic import TypeAdapter, ValidationError

    hints = typing.get_type_hints(function, include_extras=True)
    known = keywords(function)
    problems = [f"unknown argument {name}; {suggestion(name, known)}" for name in given if name not in known]
    bound: dict[str, Any] = {}
    for name, parameter in known.items():
        if name not in given:
            bound[name] = parameter.default
            if parameter.default is parameter.empty:
                problems.append(f"{name} is missing")
            continue
        try:
            bound[name] = TypeAdapter(hints[name]).validate_python(_as_declared(given[name], hints[name]), strict=True)
        except ValidationError as error:
            reasons = " or ".join(dict.fromkeys(detail["msg"].lower() for detail in error.errors()))
            problems.append(f"{name} is {given[name]!r}, {reasons}")
    if problems:
        raise UsageError("; ".join(problems), where=where)
    return bound


def _as_declared(value: Any, hint: Any) -> Any:
    """YAML and JSON have lists where a parameter is a tuple."""
    tuples = any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))
    return tuple(value) if tuples and isinstance(value, list) else value


def keywords(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of `function`."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }


def suggestion(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest of `known`, or all of them when none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else "there are " + ", ".join(known)
