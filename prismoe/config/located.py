"""YAML read into plain values that remember their line. A config is data: no anchors, no tags, no surprises.

Scalars follow the YAML 1.2 core schema, so `1e-4` is a number and `no`, `010` and `12:30` are text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from prismoe.errors import UsageError

__all__ = ["Located", "plain", "read_override", "read_yaml"]

Scalar = None | bool | int | float | str
PlaceOf = Callable[[int], str]  # line number to `file:line`
Plain = Scalar | list["Plain"] | dict[str, "Plain"]

MAX_BYTES = 1_000_000  # a config larger than this is not a config
MAX_DEPTH = 32

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,30})")
_FLOAT = re.compile(r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Scalar] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


@dataclass(frozen=True)
class Located:
    """A value and where it was written: `file:line`, or the text of an override."""

    value: Scalar | list[Located] | dict[str, Located]
    where: str


def plain(located: Located) -> Plain:
    """The value without its places."""
    if isinstance(located.value, dict):
        return {key: plain(value) for key, value in located.value.items()}
    if isinstance(located.value, list):
        return [plain(value) for value in located.value]
    return located.value


def read_yaml(path: str | Path) -> Located:
    """Read one YAML document whose root is a mapping (an empty file is an empty one).

    Raises:
        UsageError: not readable, not UTF-8, not YAML, anchors, aliases, tags, duplicate keys or several documents.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(
                f"{path.stat().st_size} bytes", where=str(path), needed=f"at most {MAX_BYTES} for a config"
            )
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at byte {error.start}", where=str(path), needed="UTF-8 text") from None
    except OSError as error:
        raise UsageError(f"cannot read it: {error.strerror}", where=str(path), needed="a YAML config") from None
    root = _read(text, lambda line: f"{path}:{line}")
    if root.value is None:
        return Located({}, str(path))
    if not isinstance(root.value, dict):
        raise UsageError("the document is not a mapping", where=root.where, needed="`section:` with keys below it")
    return root


def read_override(text: str) -> tuple[list[str], Located]:
    """Read `section.key=value` into (["section", "key"], value); the value is YAML, its place is the text itself.

    Raises:
        UsageError: no `=`, an empty name, or a value that is not YAML.
    """
    name, equals, value = text.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise UsageError("not an override", where=text, needed="section.key=value, a .yaml file or a model folder")
    return keys, _read(value, lambda line: text)


def _read(text: str, place: PlaceOf) -> Located:
    try:
        _refuse_features(text, place)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place(mark.line + 1 if mark else 1)
        found = " ".join(str(error.problem or error.context).split())
        raise UsageError(f"not YAML: {found}", where=where, hint="quote text that holds : # [ ] { } , & * !") from None
    except yaml.YAMLError as error:  # a control character has no line
        raise UsageError(f"not YAML: {' '.join(str(error).split())}", where=place(1)) from None
    if node is None:
        return Located(None, place(1))
    return _locate(node, place)


def _refuse_features(text: str, place: PlaceOf) -> None:
    """Anchors, aliases, tags, depth and second documents are found on the event stream, before anything is built."""
    documents = depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = place(event.start_mark.line + 1 if event.start_mark else 1)
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"alias *{event.anchor}", where=where, needed="the value written out")
        if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
            raise UsageError(f"anchor &{event.anchor}", where=where, needed="the value written out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise UsageError(f"tag {tag}", where=where, needed="plain data without tags")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UsageError("a second document", where=where, needed="one document in a file")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise UsageError(f"nested deeper than {MAX_DEPTH} levels", where=where, needed="section, key, value")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _locate(node: yaml.Node, place: PlaceOf) -> Located:
    where = place(node.start_mark.line + 1)
    if isinstance(node, yaml.ScalarNode):
        return Located(_scalar(node), where)
    if isinstance(node, yaml.SequenceNode):
        return Located([_locate(child, place) for child in node.value], where)
    items: dict[str, Located] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UsageError("a key that is a list or a mapping", where=place(line), needed="a name")
        if key.value in items:
            first = lines[key.value]
            raise UsageError(f"{key.value} is written twice", where=place(line), hint=f"the first is in line {first}")
        child = _locate(value, place)
        # The place of a value is the line of its key: that is the line a person looks for.
        items[key.value], lines[key.value] = Located(child.value, place(line)), line
    return Located(items, where)


def _scalar(node: yaml.ScalarNode) -> Scalar:
    text: str = node.value
    if node.style is not None:  # quoted or block: always text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9_]+", text):
        return float(text.replace("_", ""))
    return text
