"""Promises that hold for every line of the product, read off its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prismoe"

# Modules that turn bytes into code or objects of any class.
FORBIDDEN_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "torch.load", "torch.hub.load", "os.system", "os.popen"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "np.save", "numpy.save"),
}
# Files that open something for writing by themselves, each with how a reader is kept from half of it. Everything else
# goes through `folder.write_atomic`.
WRITERS = {
    "folder.py": "write_atomic itself",
    "data/writer.py": "a partial file, renamed when it is whole",
    "data/sift/columns.py": "a partial file, renamed when it is whole",
    "generate/answers.py": "a partial file of lines, renamed when it is whole; a last half line is cut off",
    "mtbench/answering.py": "lines that are appended; a last half line is cut off",
    "mtbench/judging.py": "lines that are appended; a last half line is cut off",
    "train/metrics.py": "lines that are appended; a last half line is cut off",
    "train/speed.py": "lines that are appended, of which nothing depends",
}
WRITES = {"write_text", "write_bytes", "tofile", "save_file", "savez", "savetxt", "copyfile", "copy2", "copytree"}


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def promises(path: Path) -> Iterator[str]:
    """What breaks a promise in a file: line and what."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        at = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"{at}: import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS:
                yield f"{at}: {name}("
            for keyword in node.keywords:
                value = keyword.value
                is_false = isinstance(value, ast.Constant) and value.value is False
                if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not is_false:
                    yield f"{at}: {keyword.arg}={ast.unparse(value)}"
            if name in ("np.load", "numpy.load") and not any(word.arg == "allow_pickle" for word in node.keywords):
                yield f"{at}: {name} without allow_pickle=False"
        elif isinstance(node, ast.ExceptHandler):
            caught = "" if node.type is None else ast.unparse(node.type)
            silent = all(isinstance(line, ast.Pass) for line in node.body)
            if caught in ("", "Exception", "BaseException") and silent:
                yield f"{at}: except {caught}: pass"
        suppresses = isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress")
        if suppresses and any(ast.unparse(argument) in ("Exception", "BaseException") for argument in node.args):
            yield f"{at}: suppress(Exception)"


def writes(path: Path) -> Iterator[str]:
    """Calls that write to a name of their own choice."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        texts = [arg.value for arg in [*node.args, *(k.value for k in node.keywords)] if isinstance(arg, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and 0 < len(text) < 5 and set(text) <= set("rwaxbt+")]
        opens = name == "open" and any(set("wax+") & set(mode) for mode in modes)
        maps = name in ("memmap", "open_memmap") and any(mode in ("w+", "r+") for mode in modes)
        if opens or maps or (name in WRITES and isinstance(node.func, ast.Attribute)):
            yield f"line {node.lineno}: {ast.unparse(node)[:60]}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_from_data(path: Path) -> None:
    assert list(promises(path)) == []


def test_nothing_is_written_straight_to_a_final_name() -> None:
    found = {str(path.relative_to(PACKAGE)): list(writes(path)) for path in files()}
    assert {name: lines for name, lines in found.items() if lines and name not in WRITERS} == {}
    assert {name for name in WRITERS if not found[name]} == set(), "no longer writes: take it off the list"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "torch.load(path)",
        "yaml.load(text)",
        "subprocess.run('x', shell=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "np.load(path)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "with suppress(Exception):\n    f()",
    ],
)
def test_a_broken_promise_is_seen(tmp_path: Path, line: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(line)
    assert len(list(promises(path))) == 1


@pytest.mark.parametrize(
    "line", ["open('a', 'w')", "path.open('ab')", "path.write_text('x')", "np.memmap(p, mode='w+')"]
)
def test_a_direct_write_is_seen(tmp_path: Path, line: str) -> None:
    path = tmp_path / "writes.py"
    path.write_text(line)
    assert len(list(writes(path))) == 1
