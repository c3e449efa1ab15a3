"""The house rules that a reader relies on: public surface, imports that go down only, sizes, words, lazy weight."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import prismoe

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prismoe"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# From the ground up; a file or folder that is not named here only has to keep the whole free of cycles.
FLOORS = (
    *("errors", "typed", "progress", "recipe", "registry", "room", "lock", "strictjson", "panics", "folder"),
    *("checkpoint", "stats", "layerplan", "balance"),
    *("methods", "routerinit", "plan", "target", "targets", "lowering", "account", "portability"),
    *("convert", "densify", "verify"),
    *("data", "train", "calibrate", "recover", "evaluate", "routing", "reference", "tune", "importing"),
    *("generate", "chat", "mtbench"),
    *("config", "console", "doctor", "state", "views", "report"),
    *("run", "showmixture", "show", "demo", "verbs", "cli", "__main__"),
)
# Files that work on bytes and headers alone: a machine without torch converts. Clustering may borrow its products.
WITHOUT_TORCH = {*FLOORS[: FLOORS.index("verify")], "data", "config", "console", "state", "views", "cli"} - {"balance"}

# Text is prepared without torch too, unless a model is to judge it.
MODELS_IN_DATA = {"prismoe.data.filters.perplexity"}


def imports(path: Path, *, lazy: bool) -> Iterator[str]:
    """Modules that a file imports at run time; with `lazy` also those inside functions."""
    tree = ast.parse(path.read_text())
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {child for node in for_types for child in ast.walk(node)}
    for node in ast.walk(tree) if lazy else tree.body:
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inside = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else str(node.module) for name in inside)


def unit(module: str) -> str:
    """The file or folder of prismoe/ that a module belongs to."""
    return [*module.split("."), ""][1]


def misdirected(imported: Mapping[str, Iterable[str]]) -> list[str]:
    """Imports that go up, and a cycle where there is one; `imported` by each module."""
    graph: dict[str, set[str]] = {unit(module): set() for module in imported if unit(module)}
    wrong = []
    for module, targets in imported.items():
        for target in targets:
            here, there = unit(module), unit(target) if target in MODULES else ""
            if here and there and here != there:
                graph[here].add(there)
                if {here, there} <= set(FLOORS) and FLOORS.index(there) > FLOORS.index(here):
                    wrong.append(f"{module} imports {target}")
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        wrong.append(f"cycle {' → '.join(error.args[1])}")
    return wrong


def test_imports_go_down_only() -> None:
    assert misdirected({module: set(imports(path, lazy=True)) for module, path in MODULES.items()}) == []
    assert set(FLOORS) <= {unit(module) for module in MODULES}, "a floor that is not there any more"


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ("from prismoe.cli import main", ["prismoe.errors imports prismoe.cli"]),
        ("def f():\n    import prismoe.train.loop", ["prismoe.errors imports prismoe.train.loop"]),
        ("from prismoe import showtune", ["cycle errors → showtune → errors"]),  # a file that is on no floor
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from prismoe.cli import main", []),
    ],
)
def test_an_import_that_goes_up_is_seen(tmp_path: Path, lines: str, wrong: list[str]) -> None:
    (tmp_path / "errors.py").write_text(lines)
    own = set(imports(tmp_path / "errors.py", lazy=True))
    assert misdirected({"prismoe.errors": own, "prismoe.showtune": {"prismoe.errors"}}) == wrong


def test_bytes_are_converted_without_torch() -> None:
    wrong = []
    for module, path in MODULES.items():
        heavy = {name for name in imports(path, lazy=True) if name.split(".")[0] in ("torch", "transformers")}
        if heavy and unit(module) in WITHOUT_TORCH and module not in MODELS_IN_DATA:
            wrong.append(f"{module} imports {sorted(heavy)}")
    assert wrong == []


def test_methods_targets_rules_and_policies_do_not_know_each_other() -> None:
    wrong = []
    for package in ("methods", "targets", "data.rules", "data.filters", "train.routers"):
        files = {name for name in MODULES if name.startswith(f"prismoe.{package}.")}
        wrong += [
            f"{name} imports {other}" for name in files for other in imports(MODULES[name], lazy=True) if other in files
        ]
    assert wrong == []


def test_the_public_surface_is_sorted_complete_and_documented() -> None:
    names = prismoe.__all__
    assert names == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert sorted(names) == sorted(name for home in prismoe._HOMES.values() for name in home)
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    for_types = {
        node.module: {name.name for name in node.names} for node in block.body if isinstance(node, ast.ImportFrom)
    }
    assert for_types == {f"prismoe.{home}": set(found) for home, found in prismoe._HOMES.items()}
    assert dir(prismoe) == sorted(names)
    for name in names:
        found = getattr(prismoe, name)
        assert not inspect.ismodule(found), f"{name} is a module"
        assert inspect.getdoc(found), f"{name} has no docstring"


def test_verbs_stay_verbs_after_their_files_were_imported() -> None:
    code = "import prismoe.convert, prismoe.run, prismoe; print(prismoe.convert.__name__, prismoe.run.__name__)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["convert", "run"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(prismoe, "convrt")


def test_options_are_given_by_name() -> None:
    wrong = []
    for name in prismoe.__all__:
        found = getattr(prismoe, name)
        if inspect.isfunction(found) and name != "load_config":  # load_config(path=None) is the one that may be empty
            options = [item for item in inspect.signature(found).parameters.values() if item.default is not item.empty]
            wrong += [f"{name}({item.name}=…)" for item in options if item.kind is not item.KEYWORD_ONLY]
    assert wrong == []


def test_every_file_says_what_it_is_and_names_what_it_offers() -> None:
    wrong = []
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree) and path.read_text().strip():
            wrong.append(f"{module}: no docstring")
        offered = [
            node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        ]
        for node in offered:
            names = ast.literal_eval(node.value)
            defined = {
                name.id if isinstance(name, ast.Name) else getattr(name, "name", "") for name in ast.walk(tree)
            } | {
                alias.asname or alias.name
                for item in ast.walk(tree)
                if isinstance(item, ast.ImportFrom)
                for alias in item.names
            }
            wrong += [f"{module}: {name} is not there" for name in names if name not in defined]
    assert wrong == []


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): count
        for path in python_files()
        if (count := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


def test_no_drawer_for_odds_and_ends() -> None:
    names = {part for path in python_files() for part in path.relative_to(ROOT).with_suffix("").parts}
    assert names & {"utils", "util", "common", "helpers", "misc"} == set()


def python_files() -> list[Path]:
    folders = [ROOT / name for name in ("prismoe", "tests", "examples", "benchmarks", "studies")]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))
