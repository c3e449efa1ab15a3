"""Real text that every CPython carries, as three domains: code, docstrings and the language reference.

`code` is the standard library without its docstrings, `docstrings` are those docstrings, `reference` is the
language reference as `pydoc` ships it. Which documents are held out depends on their names alone, so the split is
the same on every CPython version and the shipped parent model has seen no held-out document. Topics of the reference
quote each other, so a paragraph that also stands in a held-out topic is taken out of the training text.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from prismoe.errors import InputError
from prismoe.folder import write_atomic

__all__ = ["DOMAINS", "write_domains"]

DOMAINS = ("code", "docstrings", "reference")
_HELD_OUT_EVERY = 12  # one module in twelve, by hash
_HELD_OUT_TOPICS = (
    *("assert", "comparisons", "dynamic-features", "exprlists", "import"),
    *("lambda", "numeric-types", "shifting", "try"),
)
# Tables and tests read like noise, and some of these folders are missing from trimmed installations.
_LEFT_OUT = {"encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo"}


def write_domains(out: Path) -> dict[str, tuple[Path, Path]]:
    """Write `train.jsonl` and `heldout.jsonl` of each domain below `out`; return their paths.

    Raises:
        InputError: the running Python carries no library source or no pydoc topics.
    """
    paths: dict[str, tuple[Path, Path]] = {}
    code, docstrings = _library()
    for domain, documents in {"code": code, "docstrings": docstrings, "reference": _topics()}.items():
        splits: dict[str, list[str]] = {"train": [], "heldout": []}
        for name, text in sorted(documents.items()):
            line = json.dumps({"id": name, "content": text}, ensure_ascii=False)
            splits["heldout" if _is_held_out(name) else "train"].append(line + "\n")
        if not splits["train"] or not splits["heldout"]:
            raise InputError(
                f"no text for the domain {domain!r}",
                where=sysconfig.get_path("stdlib"),
                needed="a Python installed with its library sources",
                hint="install your system's full Python package (Debian: libpython3-stdlib), or a python.org build",
            )
        for split, lines in splits.items():
            (out / domain).mkdir(parents=True, exist_ok=True)
            write_atomic(out / domain / f"{split}.jsonl", "".join(lines).encode())
        paths[domain] = (out / domain / "train.jsonl", out / domain / "heldout.jsonl")
    return paths


def _is_held_out(name: str) -> bool:
    if name.startswith("reference/"):
        return name.removeprefix("reference/") in _HELD_OUT_TOPICS
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT_EVERY == 0


def _library() -> tuple[dict[str, str], dict[str, str]]:
    """({module: code}, {module: docstrings}) of the standard library."""
    code: dict[str, str] = {}
    docstrings: dict[str, str] = {}
    for name, source in _modules():
        code_text, docs_text = _without_docstrings(source)
        if len(code_text) >= 200:
            code[name] = code_text
        if len(docs_text) >= 200:
            docstrings[name] = docs_text
    return code, docstrings


def _modules() -> Iterator[tuple[str, str]]:
    """(dotted name, source) of the standard library's modules."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _LEFT_OUT.isdisjoint(parts):
            try:
                yield ".".join(parts), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few old modules are Latin-1


def _without_docstrings(source: str) -> tuple[str, str]:
    """Split a module into its code and its docstrings (dedented, each under its name)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # invalid escapes in old modules
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates that are not quite Python
            return "", ""
    lines = source.splitlines(keepends=True)
    docs: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        text = first.value.value
        if isinstance(text, str) and first.end_lineno is not None:
            docs.append(f"{getattr(node, 'name', 'module')}: {inspect.cleandoc(text)}\n\n")
            for number in range(first.lineno - 1, first.end_lineno):
                lines[number] = ""
    return "".join(lines), "".join(docs)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(
            "pydoc's topics are missing",
            where=sys.executable,
            needed="the module pydoc_data.topics",
            hint="install your system's full Python package (Debian: libpython3-stdlib)",
        ) from error
    seen: set[str] = set()
    documents: dict[str, str] = {}
    for name in sorted(topics, key=lambda topic: (topic not in _HELD_OUT_TOPICS, topic)):  # held-out topics first
        kept = []
        for paragraph in topics[name].split("\n\n"):
            if len(paragraph) < 40 or paragraph.strip() not in seen:
                kept.append(paragraph)
            seen.add(paragraph.strip())
        text = "\n\n".join(kept)
        if len(text) >= 200:
            documents[f"reference/{name}"] = text
    return documents
