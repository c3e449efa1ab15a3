"""Every key that a config may hold: those of the sections, and the arguments that methods and policies declare.

The signature of a method is its schema: a new file in a registry folder has its keys here without a word.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from prismoe import registry
from prismoe.config.settings import Config, DomainConfig, PlanConfig

__all__ = ["PLANNERS", "key_lines", "keywords", "known_keys", "registered", "spelled", "type_text", "wanted_statistics"]

FILTERS, POLICIES = "prismoe.data.filters", "prismoe.train.routers"
PLANNERS = (("prismoe.routerinit", "rows"), ("prismoe.methods", "split"))


def keywords(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Keyword-only parameters with (type, default): the schema of a method or policy is its signature."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {item.name: (hints[item.name], item.default) for item in parameters if item.kind is item.KEYWORD_ONLY}


def registered(package: str, name: str, function: str) -> Callable[..., Any]:
    """The function of a file that was found in a registry folder."""
    found: Callable[..., Any] = getattr(registry.load(package, name, where=package), function)
    return found


def wanted_statistics(plan: PlanConfig) -> dict[str, Any]:
    """Settings of `calibrate` that give this plan what its method, router and scale look at; empty: nothing.

    A file of a registry folder says it in a function `calibration(arguments)`, its own defaults filled in.
    """
    quantities = {"inputs"} if plan.scale == "measured" else set()
    found: dict[str, Any] = {}
    for package, function in PLANNERS:
        name = {"rows": plan.router, "split": plan.method}[function]
        if name not in registry.names(package):  # "auto", "from:FILE"
            continue
        module = registry.load(package, name, where=package)
        if hasattr(module, "calibration"):
            own = {key: default for key, (_, default) in keywords(getattr(module, function)).items()}
            asked = module.calibration({**own, **{key: plan.arguments[key] for key in own if key in plan.arguments}})
            quantities.update(asked.pop("quantities"))
            found |= asked
    return {**found, "quantities": tuple(sorted(quantities))} if quantities else {}


def known_keys() -> dict[str, tuple[Any, Any]]:
    """Every dotted key of a config with (type, default; MISSING where it must be set), for `prismoe VERB --help`."""
    from prismoe.calibrate.settings import CalibrateConfig
    from prismoe.recover.settings import RecoverConfig
    from prismoe.train.settings import PretrainConfig
    from prismoe.tune.settings import TuneConfig

    classes = (CalibrateConfig, RecoverConfig, PretrainConfig, TuneConfig)
    sections = {section.__name__: section for section in classes}
    found: dict[str, tuple[Any, Any]] = {}

    def walk(cls: Any, prefix: str) -> None:
        hints = get_type_hints(cls, localns=sections, include_extras=True)
        for item in fields(cls):
            records = [kind for kind in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(kind)]
            if item.name in ("arguments", "places") or (prefix and item.name == "seed"):
                continue
            if records:
                walk(records[0], f"{prefix}{item.name}.")
            elif item.name == "domains" and prefix == "data.":
                walk(DomainConfig, f"{prefix}domains.NAME.")
            else:
                found[prefix + item.name] = (hints[item.name], item.default)

    walk(Config, "")
    return found | {key: kind for _, key, kind in _arguments()}


def _arguments() -> Iterator[tuple[str, str, tuple[Any, Any]]]:
    """(owner, dotted key, (type, default)) of each argument of methods, router initialisations, filters, policies."""
    sections = [("plan", package, function) for package, function in PLANNERS]
    sections += [("data.filters", FILTERS, "open_scorer")]
    sections += [(section, POLICIES, "attach") for section in ("pretrain", "tune")]
    for section, package, function in sections:
        for name in [name for name in registry.names(package) if name not in _SPELLED]:
            for key, kind in keywords(registered(package, name, function)).items():
                yield name, f"{section}.{key}", kind


def key_lines(sections: Sequence[str]) -> list[str]:
    """One line for each key of `sections` and of the top level: name, default, type, and who takes it.

    A key has several lines where its takers differ in type or default.
    """
    takers: dict[str, dict[tuple[str, str], list[str]]] = {}
    for owner, name, kind in _arguments():
        takers.setdefault(name, {}).setdefault(_texts(name, kind), []).append(owner)
    lines = []
    for name, kind in known_keys().items():
        if "." not in name or name.split(".")[0] in sections:
            for (value, text), owners in takers.get(name, {_texts(name, kind): []}).items():
                lines.append(f"  {name:<28} {value:<14} {text}" + (f" ({', '.join(owners)})" if owners else ""))
    return lines


def _texts(name: str, kind: tuple[Any, Any]) -> tuple[str, str]:
    """Default and type of a key, in words."""
    hint, default = kind
    value = "(must be set)" if default in (MISSING, inspect.Parameter.empty) else json.dumps(default)
    if name not in _REGISTRIES:
        return value, type_text(hint)
    words = " or ".join(spelled(name, registry.names(_REGISTRIES[name])))
    if any(get_origin(part) is tuple for part in get_args(hint)):
        words += f"; a list of them: the arguments of each under its name, {name.split('.')[0]}.NAME.key"
    return value, words


_SPELLED = {"stored": "from:FILE"}  # with its argument
_REGISTRIES = {
    "data.filters.name": FILTERS,
    "plan.method": "prismoe.methods",
    "plan.router": "prismoe.routerinit",
    "convert.target": "prismoe.targets",
    "pretrain.mixing": "prismoe.data.rules",
    "pretrain.router": POLICIES,
    "tune.router": POLICIES,
}


def spelled(key: str, names: Sequence[str]) -> list[str]:
    """The `names` of a registry folder as a config has them."""
    more = ["auto"] if key == "plan.router" else []
    return more + [_SPELLED.get(name, name) for name in names]


def type_text(hint: Any) -> str:
    """A type in words."""
    words = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        type(None): "nothing",
        dict: "mapping",
    }
    if get_origin(hint) is Annotated:
        return type_text(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        return f"list of {_several(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return f"mapping of names to {_several(get_args(hint)[1])}"
    return words.get(hint) or " or ".join(type_text(part) for part in get_args(hint))


def _several(hint: Any) -> str:
    """`type_text` in the plural."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_several, get_args(hint)))
    first, space, rest = type_text(hint).partition(" ")
    return f"{first}s{space}{rest}"
