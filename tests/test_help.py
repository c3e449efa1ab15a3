"""Help pages: every verb, key and option that the parser takes, and no other."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from prismoe.cli import _read, main
from prismoe.config import Config
from prismoe.errors import UsageError
from prismoe.verbs.table import FLAGS, VERBS

HEAVY = {"torch", "transformers", "numpy", "pydantic", "rich", "yaml", "matplotlib", "huggingface_hub"}


def test_help_names_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    page = capsys.readouterr().out
    assert main(["--help"]) == main(["-h"]) == 0
    assert capsys.readouterr().out == 2 * page
    assert set(VERBS) == {
        *("plan", "convert", "verify", "prepare", "calibrate", "pretrain", "eval", "report", "run"),
        *("import", "densify", "show", "sift", "train-filter", "reference-loss", "doctor", "demo"),
        *("trace", "tune", "similarity", "prune-experts", "chat", "generate", "mt-bench", "recover"),
    }
    assert all(f"\n  {verb} " in page for verb in VERBS)
    assert all(code in page for code in ("2 usage", "3 bad input", "4 resources", "5 numerical", "75 interrupted"))


def test_help_of_a_verb_lists_its_keys_with_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["plan.top_k", "2", "integer"] in lines
    shared = next(line for line in lines if line and line[0] == "plan.shared")  # an argument of some methods
    assert shared[1:3] == ["0", "integer"]
    assert {"random,", "upcycle)"} <= set(shared)
    assert ["plan.prompts", "null", "list", "of", "lists", "of", "texts", "or", "nothing"] in lines
    assert not any(line and line[0].startswith("pretrain.") for line in lines)
    router = next(line for line in lines if line and line[0] == "plan.router")
    assert "from:FILE" in router
    assert "stored" not in router


def test_help_lists_the_arguments_of_router_policies(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("pretrain", "tune"):
        assert main([verb, "--help"]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert [f"{verb}.coefficient", "0.01", "number", "(noisy_topk,", "switch)"] in lines
        assert [f"{verb}.coefficient", "0.001", "number", "(z_loss)"] in lines  # its own default
        assert [f"{verb}.factor", "1.0", "number", "(capacity)"] in lines
        assert [f"{verb}.compat", "false", "true", "or", "false", "(noisy_topk)"] in lines


def test_help_of_run_lists_the_keys_of_all_its_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    sections = {line[0].partition(".")[0] for line in lines if line and line[0][0].islower() and "." in line[0]}
    nested = {item.name for item in fields(Config)} - {"source", "out", "seed", "places", "tune"}
    assert sections == nested


@pytest.mark.parametrize("verb", list(VERBS))
def test_help_offers_what_the_parser_accepts(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    offered = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    for name, flag in FLAGS.items():
        words = [verb, name, *flag.value.replace("N", "1").split()]
        if name in offered:
            assert _read(words).verb == verb
        else:
            with pytest.raises(UsageError, match=f"^{name} with {verb}; needed "):
                _read(words)


@pytest.mark.parametrize(
    ("verb", "usage"),
    [
        ("plan", "plan [CONFIG.yaml | MODEL | RUN_FOLDER] [section.key=value ...] [options]"),
        ("train-filter", "train-filter [key=value ...] [options]"),
        ("doctor", "doctor [options]"),
        ("demo", "demo [section.key=value ...] [options]"),
        ("reference-loss", "reference-loss MODEL DATA [key=value ...] [options]"),
        ("similarity", "similarity MODEL | RUN_FOLDER [OTHER ...] [options]"),
        ("generate", "generate MODEL [FILE] [key=value ...] [options]"),
        ("mt-bench", "mt-bench MODEL | ANSWERS [key=value ...] [options]"),
    ],
)
def test_usage_is_of_the_verb(verb: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"\nusage: prismoe {usage}\n" in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, io, contextlib\n"
        "import prismoe.cli\n"
        "with contextlib.redirect_stdout(io.StringIO()): prismoe.cli.main(['--help'])\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY & set(loaded) == set()
