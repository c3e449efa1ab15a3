"""One YAML per run, read into frozen dataclasses. Wrong keys and values are told with their line, all at once."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from pydantic import Field

from prismoe import registry
from prismoe.bind import Binder
from prismoe.errors import UsageError
from prismoe.located import Located, read_override, read_yaml

if TYPE_CHECKING:
    from prismoe.train.settings import PretrainConfig

__all__ = [
    "Config",
    "ConvertConfig",
    "DataConfig",
    "DomainConfig",
    "EvalConfig",
    "PlanConfig",
    "VerifyConfig",
    "key_lines",
    "known_keys",
    "load_config",
]

Paths = str | list[str]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class PlanConfig:
    """Which neurons become which expert. `arguments` are the method's own (`num_experts`, `scale`, …)."""

    method: str = "random"
    top_k: Positive = 2
    layers: str | int | list[int] = "all"
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ConvertConfig:
    """How the plan is written: the architecture, zero neurons up to a multiple of `pad_to`, bytes per shard."""

    target: str = "mixtral"
    pad_to: Positive = 32
    max_shard_bytes: Positive = 5_000_000_000


@dataclass(frozen=True)
class VerifyConfig:
    """How many tokens of text go through the layers."""

    tokens: Positive = 128


@dataclass(frozen=True)
class DomainConfig:
    """Text of one domain: files or globs; without `heldout` a share of the documents is held out by hash."""

    train: Paths
    heldout: Paths | None = None
    field: str = "auto"


@dataclass(frozen=True)
class DataConfig:
    """The domains, the tokenizer (default: the source's) and the weights to mix them with (a preset or numbers)."""

    domains: Annotated[dict[str, DomainConfig], Field(min_length=1)]
    weights: str | dict[str, Annotated[float, Field(ge=0)]] = "proportional"
    tokenizer: str | None = None
    heldout_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss: windows of `seq_len` ids (default: the training length), up to `max_tokens` of each domain."""

    seq_len: Positive | None = None
    max_tokens: Annotated[int, Field(ge=2)] = 100_000
    batch_size: Positive = 16


@dataclass(frozen=True)
class Config:
    """A whole run. `source` is a dense HF folder or hub name, `out` the run folder."""

    source: str | None = None
    out: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    plan: PlanConfig = field(default_factory=PlanConfig)
    convert: ConvertConfig = field(default_factory=ConvertConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    data: DataConfig | None = None
    pretrain: PretrainConfig | None = None
    eval: EvalConfig = field(default_factory=EvalConfig)
    places: dict[str, str] = field(default_factory=dict, compare=False, repr=False)  # dotted key: where it was written

    def need(self, key: str) -> Any:
        """The value of an optional top-level key that a verb cannot do without.

        Raises:
            UsageError: it is not set.
        """
        value = getattr(self, key)
        if value is None:
            hint = f"{key}=FOLDER" if key == "source" else "--out FOLDER" if key == "out" else f"a `{key}:` section"
            raise UsageError(f"{key} is not set", where=self.place(""), needed=hint)
        return value

    def place(self, key: str) -> str:
        """Where dotted `key` was written, for messages about its value: file:line, the override, or the key itself."""
        written = self.places.get(key)
        return f"{written}: {key}" if written and key and not written.startswith(key) else written or key

    def to_dict(self) -> dict[str, Any]:
        """The keys as a config file holds them: `load_config` of their YAML gives an equal config."""
        found = {key: value for key, value in asdict(self).items() if value is not None and key != "places"}
        for section in ("plan", "pretrain"):
            found.get(section, {}).update(found.get(section, {}).pop("arguments", {}))
        found.get("pretrain", {}).pop("seed", None)  # one seed for the whole run
        jsonable: dict[str, Any] = json.loads(json.dumps(found))  # tuples become lists, as YAML has them
        return jsonable


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
    hints = get_type_hints(Config, localns={"PretrainConfig": Any}, include_extras=True)
    values: dict[str, Any] = {"places": {"": origin, **dict(_places(root, ""))}}
    for name, at in sections.items():
        if name == "plan":
            values[name] = binder.record(PlanConfig, at, name, _method_arguments(binder, at))
        elif name == "pretrain":
            values[name] = None if at.value is None else _pretrain(binder, at)
        elif name == "convert":
            _choice(binder, at, "convert.target", ConvertConfig.target, registry.names("prismoe.targets"))
            values[name] = binder.value(at, name, hints[name])
        else:
            values[name] = binder.value(at, name, hints[name])
    if binder.problems:
        raise UsageError("\n".join(binder.problems))
    config = Config(**values)
    return replace(config, pretrain=config.pretrain and replace(config.pretrain, seed=config.seed))


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


def _keywords(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Keyword-only parameters with (type, default): the schema of a method or policy is its signature."""
    hints = get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {item.name: (hints[item.name], item.default) for item in parameters if item.kind is item.KEYWORD_ONLY}


def _choice(binder: Binder, at: Located, path: str, default: str, names: Sequence[str]) -> str | None:
    """The name that section key `path` chooses from a registry folder, or None after noting that it is not there."""
    chosen = at.value.get(path.rpartition(".")[2]) if isinstance(at.value, dict) else None
    name = default if chosen is None else chosen.value
    if name in names:
        return str(name)
    if chosen is not None and isinstance(name, str):
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else ""
        binder.problem(chosen.where, f"{path} is {name!r}", f"one of {', '.join(names)}", hint)
    return None


def _method_arguments(binder: Binder, at: Located) -> dict[str, Any]:
    """Types of the arguments of the chosen method; those of every method when there is no such one."""
    names = registry.names("prismoe.methods")
    chosen = _choice(binder, at, "plan.method", PlanConfig.method, names)
    found: dict[str, Any] = {}
    for name in [chosen] if chosen else names:
        found |= {key: hint for key, (hint, _) in _keywords(_split(name)).items()}
    return found


def _split(method: str) -> Callable[..., Any]:
    """The function of a method whose name was found in the folder."""
    split: Callable[..., Any] = registry.load("prismoe.methods", method, where="plan.method").split
    return split


def _pretrain(binder: Binder, at: Located) -> Any:
    """The pretrain section: its own keys but the seed (a run has one), and the router policy's arguments."""
    from prismoe.train import settings

    own = {item.name for item in fields(settings.PretrainConfig)}
    extra: dict[str, Any] = {}
    chosen = _choice(
        binder, at, "pretrain.router", settings.PretrainConfig.router, registry.names("prismoe.train.routers")
    )
    if chosen and isinstance(at.value, dict) and at.value.keys() - own:  # only then is torch worth its two seconds
        attach = registry.load("prismoe.train.routers", chosen, where="pretrain.router").attach
        extra = {key: hint for key, (hint, _) in _keywords(attach).items()}
    return binder.record(settings.PretrainConfig, at, "pretrain", extra, without="seed")


def known_keys() -> dict[str, tuple[Any, Any]]:
    """Every dotted key of a config with (type, default; MISSING where it must be set), for `prismoe VERB --help`."""
    from prismoe.train.settings import PretrainConfig

    found: dict[str, tuple[Any, Any]] = {}

    def walk(cls: Any, prefix: str) -> None:
        hints = get_type_hints(cls, localns={"PretrainConfig": PretrainConfig}, include_extras=True)
        for item in fields(cls):
            records = [kind for kind in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(kind)]
            if item.name in ("arguments", "places") or (prefix and item.name == "seed"):
                continue
            if records:
                walk(records[0], f"{prefix}{item.name}.")
            elif item.name == "domains":
                walk(DomainConfig, f"{prefix}domains.NAME.")
            else:
                found[prefix + item.name] = (hints[item.name], item.default)

    walk(Config, "")
    for name in registry.names("prismoe.methods"):
        found |= {f"plan.{key}": kind for key, kind in _keywords(_split(name)).items()}
    return found


def key_lines(sections: Sequence[str]) -> list[str]:
    """One line for each key of `sections` and of the top level: name, default and type."""
    lines = []
    for name, (hint, default) in known_keys().items():
        if "." not in name or name.split(".")[0] in sections:
            value = "(must be set)" if default in (MISSING, inspect.Parameter.empty) else json.dumps(default)
            lines.append(f"  {name:<28} {value:<14} {_type_text(hint)}")
    return lines


def _type_text(hint: Any) -> str:
    words = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true or false",
        type(None): "nothing",
        dict: "mapping",
    }
    if get_origin(hint) is Annotated:
        return _type_text(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return " or ".join(map(str, get_args(hint)))
    if get_origin(hint) in (list, tuple):
        return f"list of {_type_text(get_args(hint)[0])}s"
    if get_origin(hint) is dict:
        return f"mapping of names to {_type_text(get_args(hint)[1])}s"
    return words.get(hint) or " or ".join(_type_text(part) for part in get_args(hint))
