"""What a run that was begun in a folder had set, and whether the settings of now are the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prismoe import registry
from prismoe.train.settings import PretrainConfig

__all__ = ["as_recorded", "differences"]


def as_recorded(path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The job that was begun in the folder where `job` is the same: settings of later versions have their defaults.

    So have arguments that a router policy or a mixing rule got later.
    """
    try:
        before = json.loads(path.read_bytes())
        known = before["pretrain"]
        now = json.loads(json.dumps(job))
        now["pretrain"] = _known(now["pretrain"], known, _defaults(now["pretrain"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return job
    return before if now == before else job


def _known(now: dict[str, Any], known: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`now` without what `known` does not have and is at its default; mappings within mappings likewise."""
    found = {}
    for key, value in now.items():
        if key not in known and value == defaults.get(key):
            continue
        nested = isinstance(value, dict) and isinstance(known.get(key), dict) and isinstance(defaults.get(key), dict)
        found[key] = _known(value, known[key], defaults[key]) if nested else value
    return found


def _defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting's default, as JSON has it; those of arguments by the policies and the rule that are at work."""
    found = asdict(PretrainConfig())
    router = settings.get("router", found["router"])
    policies = {name: _keywords("prismoe.train.routers", name, "attach") for name in _names(router)}
    found["arguments"] = policies[router] if isinstance(router, str) else policies
    found["mixing_arguments"] = _keywords("prismoe.data.rules", settings.get("mixing", found["mixing"]), "update")
    jsonable: dict[str, Any] = json.loads(json.dumps(found))
    return jsonable


def _names(router: str | Iterable[str]) -> list[str]:
    return [router] if isinstance(router, str) else list(router)


def _keywords(package: str, name: str, function: str) -> dict[str, Any]:
    parameters = registry.keywords(getattr(registry.load(package, name, where=package), function))
    return {key: item.default for key, item in parameters.items() if item.default is not item.empty}


def differences(path: Path, job: Mapping[str, Any]) -> list[str]:
    """What a run that was begun in the folder had otherwise."""
    try:
        before = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return []
    found = []
    for section, now in json.loads(json.dumps(job)).items():
        old = before.get(section, {})
        found += [
            f"{section}.{key} was {json.dumps(old.get(key))[:60]}, is {json.dumps(now.get(key))[:60]}"
            for key in sorted({*now, *old})
            if now.get(key) != old.get(key)
        ]
    return found
