"""Promises that hold for every line of the product, read off its syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "prismoe"

# Modules that turn bytes into code or objects of any class.
FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
# Under the name of the module they come from, however a file calls them. `numpy.save` gives a file its final name.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path", "runpy.run_module"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "pandas.read_pickle", "numpy.save"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"),
}
NEVER_TRUE = ("shell", "trust_remote_code", "allow_pickle")
# Functions that open something for writing by themselves, each with how a reader is kept from half of it. Everything
# else goes through `folder.write_atomic`.
WRITERS = {
    "calibrate/states.py:States.__init__": "scratch, read by the same command alone, to which a record of progress "
    "says how far it holds; gone when the calibration is whole",
    "calibrate/watch.py:_in_place": "scratch, as the states",
    "cli.py:_main": "the null device",
    "convert/writer.py:_open": "a partial file, renamed when it is whole",
    "data/sift/columns.py:ColumnWriter.__enter__": "partial files, renamed when they are whole",
    "data/writer.py:HashedFile.__init__": "a partial file, renamed when it is whole",
    "lock.py:_take": "the lock: its text is for an error message only, and goes with the lock",
    "folder.py:write_atomic": "a partial file, renamed when it is whole",
    "generate/answers.py:answer_file": "OUT.partial: rows after an atomic start without half lines; OUT is atomic",
    "mtbench/answering.py:answer_questions": "whole batches are kept by the next command, half lines are not; "
    "the manifest of the folder comes last",
    "mtbench/judging.py:_append": "each judgment is kept at once, a half last line is left out; atomic at the end",
    "report/planpicture.py:picture_bytes": "memory",
    "showmixture.py:draw_weights": "memory",
    "train/checkpoints.py:save": "a folder that is a checkpoint once its manifest is there, which comes last",
    "train/metrics.py:MetricsLog.__init__": "cut to what the checkpoint remembers; readers leave a half last line out",
    "train/model.py:_write_shard": "a partial file, renamed when it is whole",
    "train/scalars.py:Scalars.begin": "curves for people: no manifest lists them, nothing of ours reads them",
    "train/speed.py:Timing.__init__": "a half last line is cut off before more is written; readers leave it out",
}
WRITES = {
    *("write_text", "write_bytes", "tofile", "touch", "symlink_to", "hardlink_to", "savez", "savez_compressed"),
    *("savetxt", "savefig", "save_file", "save_pretrained", "copyfile", "copy2", "copytree", "copyfileobj", "move"),
    *("SummaryWriter", "ParquetWriter", "write_table", "HuggingFaceStorageWriter", "ZipFile", "mkstemp"),
}
READS = {"O_RDONLY", "O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW"}


def trees() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def origins(tree: ast.AST) -> dict[str, str]:
    """Names that imports bind anywhere in a file, with what they stand for."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return found


def full_name(node: ast.expr, known: dict[str, str]) -> str:
    """`torch.load` for that and for whatever else a file calls it."""
    first, dot, rest = ast.unparse(node).partition(".")
    return f"{known.get(first, first)}{dot}{rest}".removeprefix("builtins.")


def promises(tree: ast.AST) -> Iterator[str]:
    """What breaks a promise: line and what."""
    known = origins(tree)
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        at = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"{at}: import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.Attribute) or (isinstance(node, ast.Name) and node in called):
            if (name := full_name(node, known)) in FORBIDDEN:
                yield f"{at}: {name}"
        elif isinstance(node, ast.Call):
            given = [(word.arg, word.value) for word in node.keywords]
            yield from (f"{at}: {ast.unparse(value)[:40]} as {key}" for key, value in given if _may_be_true(key, value))
            if full_name(node.func, known) == "numpy.load" and "allow_pickle" not in dict(given):
                yield f"{at}: numpy.load without allow_pickle=False"
        elif isinstance(node, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            yield from (
                f"{at}: {key!r}" for key, value in zip(keys, node.values, strict=True) if _may_be_true(key, value)
            )
        if _swallows(node, known):
            yield f"{at}: every exception passes in silence"


def _may_be_true(key: object, value: ast.expr) -> bool:
    return key in NEVER_TRUE and not (isinstance(value, ast.Constant) and value.value is False)


def _swallows(node: ast.AST, known: dict[str, str]) -> bool:
    if isinstance(node, ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        silent = all(isinstance(line, ast.Pass) or _is_constant(line) for line in node.body)
        return silent and any(one is None or _is_everything(one) for one in caught)
    if isinstance(node, ast.Call) and full_name(node.func, known) in ("suppress", "contextlib.suppress"):
        return any(_is_everything(one) for one in node.args)
    return False


def _is_constant(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _is_everything(caught: ast.expr) -> bool:
    return ast.unparse(caught) in ("Exception", "BaseException")


def writes(node: ast.AST, known: dict[str, str], within: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Calls that write to a name of their own choice: the function they stand in, and what they are."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        within = (*within, node.name)
    if isinstance(node, ast.Call) and _writes(node, known):
        yield ".".join(within), f"line {node.lineno}: {ast.unparse(node)[:60]}"
    for child in ast.iter_child_nodes(node):
        yield from writes(child, known, within)


def _writes(call: ast.Call, known: dict[str, str]) -> bool:
    whole = full_name(call.func, known)
    name = whole.rpartition(".")[2]
    given = [*call.args, *(word.value for word in call.keywords)]
    if whole == "os.open":  # whatever is not known to be for reading
        flags = [node for node in ast.walk(given[1]) if isinstance(node, ast.Name | ast.Attribute)]
        return bool({ast.unparse(node).removeprefix("os.") for node in flags} - {*READS, "os"})
    if name in ("open", "fdopen", "memmap", "open_memmap"):
        texts = [node.value for value in given for node in ast.walk(value) if isinstance(node, ast.Constant)]
        modes = [text for text in texts if isinstance(text, str) and 0 < len(text) < 4 and set(text) <= set("rwaxbt+")]
        return any(set("wax+") & set(mode) for mode in modes)
    return name in WRITES


def test_no_code_from_data_and_no_error_in_silence() -> None:
    found = {name: list(promises(tree)) for name, tree in trees().items()}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert len(found) > 300


def test_nothing_is_written_straight_to_a_final_name() -> None:
    found = {
        f"{name}:{function}": line for name, tree in trees().items() for function, line in writes(tree, origins(tree))
    }
    assert {place: line for place, line in found.items() if place not in WRITERS} == {}
    assert set(WRITERS) - set(found) == set(), "no longer writes: take it off the list"


@pytest.mark.parametrize(
    "lines",
    [
        "import pickle",
        "def f():\n    import marshal",
        "import shelve as kept",
        "from dill import loads",
        "from joblib import load",
        "from pickle import load",
        "eval('1')",
        "exec(text)",
        "import builtins\nbuiltins.eval('1')",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "torch.load(path)",
        "from torch import load as read\nread(path)",
        "import torch as t\nread = t.load",
        "yaml.load(text)",
        "import yaml as y\ny.unsafe_load(text)",
        "subprocess.run('x', shell=True)",
        "subprocess.run('x', **{'shell': flag})",
        "os.system('x')",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, Exception):\n    ...",
        "try:\n    f()\nexcept:\n    'nobody asks'",
        "with suppress(Exception):\n    f()",
        "import contextlib\nwith contextlib.suppress(ValueError, BaseException):\n    f()",
    ],
)
def test_a_broken_promise_is_seen(lines: str) -> None:
    assert len(list(promises(ast.parse(lines)))) == 1


@pytest.mark.parametrize(
    "lines",
    [
        "model.eval()",
        "re.compile('x')",
        "yaml.safe_load(text)",
        "json.load(file)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "try:\n    f()\nexcept Exception as error:\n    raise Told from error",
        "with suppress(OSError):\n    f()",
    ],
)
def test_what_is_kept_is_not_called_broken(lines: str) -> None:
    assert list(promises(ast.parse(lines))) == []


@pytest.mark.parametrize(
    "line",
    [
        "open('a', 'w')",
        "open('a', mode='x')",
        "path.open('ab')",
        "path.open('r+b' if found else 'wb')",
        "path.write_text('x')",
        "np.memmap(p, mode='w+')",
        "np.memmap(p, mode='r+' if made else 'w+')",
        "os.open(path, os.O_RDWR | os.O_CREAT)",
        "os.open(path, flags)",
        "save_file(tensors, path)",
        "safetensors.torch.save_file(tensors, path)",
        "shutil.copyfile(a, b)",
        "model.save_pretrained(folder)",
    ],
)
def test_a_direct_write_is_seen(line: str) -> None:
    tree = ast.parse(f"class Log:\n    def keep(self):\n        {line}")
    assert [place for place, _ in writes(tree, origins(tree))] == ["Log.keep"]


@pytest.mark.parametrize(
    "line", ["path.open('rb')", "np.memmap(p, mode='r')", "os.open(folder, os.O_RDONLY | os.O_DIRECTORY)", "a.copy()"]
)
def test_reading_is_not_writing(line: str) -> None:
    assert list(writes(ast.parse(line), {})) == []
