"""One YAML per run, read into frozen dataclasses. Wrong keys and values are told with their line, all at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from prismoe import registry
from prismoe.config.bind import Binder
from prismoe.config.keys import PLANNERS, keywords, known_keys, registered, spelled, wanted_statistics
from prismoe.config.located import Located, read_override, read_yaml
from prismoe.config.settings import Config, ConvertConfig, DataConfig, PlanConfig
from prismoe.data.filters import FilterSpec
from prismoe.data.weights import check_weights
from prismoe.errors import UsageError

__all__ = ["Config", "load_config"]


def load_config(path: str | Path | None = None, *, overrides: Sequence[str] = (), **fixed: Any) -> Config:
    """Read `path` (None: nothing but defaults), then `section.key=value` overrides, then `fixed` top-level values.

    Raises:
        UsageError: every problem at once, one line each; where is file:line or the override.
    """
    origin = "command line" if path is None else str(path)
    root = Located({}, origin) if path is None else read_yaml(path)
    for text in overrides:
        keys, value = read_override(text)
        root = _with(root, keys, value, text)
    for key, setting in fixed.items():
        root = _with(root, [key], Located(setting, f"--{key} {setting}"), key)
    binder = Binder(known_keys())
    sections = binder.keys(root, "", [item.name for item in fields(Config) if item.name != "places"])
    hints = get_type_hints(
        Config,
        localns=dict.fromkeys(("CalibrateConfig", "RecoverConfig", "PretrainConfig", "TuneConfig"), Any),
        include_extras=True,
    )
    values: dict[str, Any] = {"places": {"": origin, **dict(_places(root, ""))}}
    for name, at in sections.items():
        if name == "plan":
            values[name] = binder.record(PlanConfig, at, name, _method_arguments(binder, at))
        elif name == "pretrain":
            values[name] = None if at.value is None else _pretrain(binder, at)
        elif name == "tune":
            values[name] = None if at.value is None else _tune(binder, at)
        elif name == "calibrate":
            values[name] = None if at.value is None else _calibrate(binder, at)
        elif name == "recover":
            values[name] = None if at.value is None else _recover(binder, at)
        elif name == "data":
            values[name] = None if at.value is None else _data(binder, at)
        elif name == "convert":
            _choice(binder, at, "convert.target", ConvertConfig.target, registry.names("prismoe.targets"))
            values[name] = binder.value(at, name, hints[name])
        else:
            values[name] = binder.value(at, name, hints[name])
    if binder.problems:
        raise UsageError("\n".join(sorted(binder.problems, key=lambda line: _line_number(line, origin))))
    config = Config(**values)
    calibrate = config.calibrate and replace(config.calibrate, **_chosen(config), seed=config.seed)
    pretrain = config.pretrain and replace(config.pretrain, seed=config.seed)
    recovered = config.recover and replace(config.recover, seed=config.seed)
    tuned = config.tune and replace(config.tune, seed=config.seed)
    return replace(config, calibrate=calibrate, recover=recovered, pretrain=pretrain, tune=tuned)


def _chosen(config: Config) -> dict[str, Any]:
    """Settings of the calibration that nobody wrote down: what the plan looks at."""
    asked = wanted_statistics(config.plan)
    return {key: value for key, value in asked.items() if f"calibrate.{key}" not in config.places}


def _line_number(problem: str, origin: str) -> float:
    """Problems are told in the order of the file, those of overrides last."""
    found = re.match(re.escape(origin) + r":(\d+):", problem)
    return int(found[1]) if found else float("inf")


def _places(at: Located, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(at.value, dict):
        for key, child in at.value.items():
            name = f"{path}.{key}" if path else key
            yield name, child.where
            yield from _places(child, name)


def _with(root: Located, keys: Sequence[str], value: Located, text: str) -> Located:
    """`root` with the value at dotted `keys` replaced; sections that are not there are made."""
    below = {} if root.value is None else root.value
    if not isinstance(below, dict):
        hint = f"it has one at {root.where}"
        raise UsageError(f"{keys[0]} lies below a value", where=text, needed="a section", hint=hint)
    rest = keys[1:]
    child = _with(below.get(keys[0], Located(None, text)), rest, value, text) if rest else value
    return Located({**below, keys[0]: child}, root.where)


def _choice(binder: Binder, at: Located, path: str, default: str, names: Sequence[str]) -> str | None:
    """The name that section key `path` chooses from a registry folder, or None after noting that it is not there."""
    chosen = at.value.get(path.rpartition(".")[2]) if isinstance(at.value, dict) else None
    name = default if chosen is None else chosen.value
    if path == "plan.router" and isinstance(name, str):  # the two names that are no file: see `make_plan`
        name = {"auto": "random", "from": "stored"}.get(name.partition(":")[0], name)
    if name in names:
        return str(name)
    if chosen is not None and isinstance(name, str):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        binder.problem(chosen.where, f"{path} is {name!r}", f"one of {', '.join(spelled(path, names))}", hint)
    return None


def _method_arguments(binder: Binder, at: Located) -> dict[str, Any]:
    """Types of the arguments of the chosen method and router; those of every one where the name is wrong."""
    found: dict[str, Any] = {}
    for package, function in PLANNERS:
        key = {"rows": "router", "split": "method"}[function]
        names = registry.names(package)
        chosen = _choice(binder, at, f"plan.{key}", getattr(PlanConfig, key), names)
        for name in [chosen] if chosen else names:
            found |= {name: hint for name, (hint, _) in keywords(registered(package, name, function)).items()}
    return found


def _data(binder: Binder, at: Located) -> Any:
    """The data section; each of its filters has the arguments of its own file."""
    given = at.value.get("filters") if isinstance(at.value, dict) else None
    if not isinstance(at.value, dict) or given is None or given.value is None:
        return _weighted(binder, at, binder.record(DataConfig, at, "data"))
    rest = {key: value for key, value in at.value.items() if key != "filters"}
    data = _weighted(binder, at, binder.record(DataConfig, Located(rest, at.where), "data"))
    if not isinstance(given.value, list):
        binder.problem(given.where, "data.filters is no list", "a list of filters, such as [{name: gopher}]")
        return None
    names = registry.names("prismoe.data.filters")
    specs = []
    for one in given.value:
        chosen = one.value.get("name") if isinstance(one.value, dict) else None
        extra: dict[str, Any] = {}
        if chosen is not None and chosen.value not in names:
            hint = registry.suggestion(str(chosen.value), names)
            binder.problem(chosen.where, f"data.filters.name is {chosen.value!r}", f"one of {', '.join(names)}", hint)
            continue
        if chosen is not None:
            arguments = keywords(registered("prismoe.data.filters", str(chosen.value), "open_scorer"))
            extra = {key: hint for key, (hint, _) in arguments.items()}
        specs.append(binder.record(FilterSpec, one, "data.filters", extra))
    return data and replace(data, filters=specs)


def _weighted(binder: Binder, at: Located, data: DataConfig | None) -> DataConfig | None:
    """`data` itself, after noting weights that do not fit its domains: the text need not be prepared to know that."""
    try:
        if data is not None:
            check_weights(data.weights, list(data.domains))
    except UsageError as error:
        where = at.value.get("weights", at).where if isinstance(at.value, dict) else at.where
        binder.problem(where, f"data.{error.where}: {error.found}", error.needed, error.hint)
    return data


def _calibrate(binder: Binder, at: Located) -> Any:
    """The calibrate section: its own keys but the seed (a run has one)."""
    from prismoe.calibrate.settings import CalibrateConfig

    return binder.record(CalibrateConfig, at, "calibrate", without="seed")


def _recover(binder: Binder, at: Located) -> Any:
    """The recover section, likewise."""
    from prismoe.recover.settings import RecoverConfig

    return binder.record(RecoverConfig, at, "recover", without="seed")


def _pretrain(binder: Binder, at: Located) -> Any:
    """The pretrain section: its own keys but the seed (a run has one), and the router policy's arguments."""
    from prismoe.train.routers import arguments_of, check_steps
    from prismoe.train.settings import PretrainConfig

    _choice(binder, at, "pretrain.mixing", PretrainConfig.mixing, registry.names("prismoe.data.rules"))
    made = _with_policy(binder, at, "pretrain", PretrainConfig)
    if isinstance(made, PretrainConfig):
        try:
            check_steps(made.router, arguments_of(made.router, made.arguments), steps=made.steps)
        except UsageError as error:
            binder.problem(at.where, str(error))
    return made


def _tune(binder: Binder, at: Located) -> Any:
    """The tune section, likewise."""
    from prismoe.tune.settings import TuneConfig

    return _with_policy(binder, at, "tune", TuneConfig)


def _with_policy(binder: Binder, at: Located, section: str, cls: Any) -> Any:
    """A section that names router policies and holds their arguments."""
    extra: dict[str, Any] = {}
    names = registry.names("prismoe.train.routers")
    given = at.value.get("router") if isinstance(at.value, dict) else None
    if given is not None and isinstance(given.value, list):  # several: the arguments of each lie under its name
        for one in given.value:
            if one.value not in names:
                binder.problem(one.where, f"{section}.router has {one.value!r}", f"some of {', '.join(names)}")
        extra = {one.value: dict[str, Any] for one in given.value if one.value in names}
        return binder.record(cls, at, section, extra, without="seed")
    chosen = _choice(binder, at, f"{section}.router", str(cls.router), names)
    own = {item.name for item in fields(cls)}
    if chosen and isinstance(at.value, dict) and at.value.keys() - own:  # only then is torch worth its two seconds
        attach = registered("prismoe.train.routers", chosen, "attach")
        extra = {key: hint for key, (hint, _) in keywords(attach).items()}
    return binder.record(cls, at, section, extra, without="seed")
