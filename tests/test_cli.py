"""The command line: verbs, exit codes, one line for an error, one object for `--json`, bars for a terminal only."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prismoe.cli import main
from tests.runs import copy_of, finished, workplace
from tests.tiny import tiny_dense


def command(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prismoe", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit code, stderr) of a command that must print nothing on stdout."""
    code = main(arguments)
    out, err = capsys.readouterr()
    assert out == ""
    assert code != 0
    return code, err.removesuffix("\n")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["plna"], "unknown verb 'plna'; needed one of plan, convert, verify"),
        (["plan", "--fast"], "unrecognized arguments: --fast (hint: prismoe --help)"),
        (["plan", "a", "b"], "'b' after 'a'; needed prismoe plan [CONFIG.yaml | MODEL | RUN_FOLDER] "),
        (["doctor", "a"], "'a'; needed prismoe doctor [options]"),
        (["doctor", "plan.top_k=1"], "plan.top_k=1; needed prismoe doctor [options]"),
        (["similarity", "a", "b", "top_k=1"], "top_k=1; needed prismoe similarity MODEL | RUN_FOLDER [OTHER ...]"),
        (["generate", "a", "b", "c"], "'c' after 'b'; needed prismoe generate MODEL [FILE]"),
        (["plan"], "command line: source is not set; needed source=FOLDER"),
        (["show"], "nothing to show; needed a run folder"),
        (["run", "absent.yaml"], "absent.yaml: cannot read it: No such file or directory; needed a YAML config"),
        (["plan", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (
            ["eval", "--max-steps", "3"],
            "--max-steps with eval; needed prismoe pretrain, tune or run (hint: prismoe eval --help)",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    code, err = fails(capsys, *arguments)
    assert code == 2
    assert err.startswith(f"prismoe: {line}")
    assert "\n" not in err


def test_every_wrong_key_has_its_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("plan: {top: 1}\nconvert: {pad: 2}\n")
    code, err = fails(capsys, "plan", str(path))
    assert (code, len(err.splitlines())) == (2, 2)
    assert all(line.startswith("prismoe: ") for line in err.splitlines())


def test_plan_prints_what_would_come_out(capsys: pytest.CaptureFixture[str]) -> None:
    source = str(finished()[0] / "dense")
    capsys.readouterr()  # what making the model said
    assert main(["plan", source, "plan.num_experts=4", "convert.pad_to=8"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "random: 4 experts × 24 neurons, top-2, 3 of 3 layers, seed 0" in lines
    assert "FFN active 100 % 50.0 %" in lines
    assert "✗ qwen3_moe qk_norm is False, needs True: it always norms queries and keys" in lines


def test_a_plan_for_a_target_that_cannot_hold_it_names_one_that_can(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    source = str(tiny_dense(tmp_path / "dense", "qwen3"))
    capsys.readouterr()
    arguments = [source, "plan.num_experts=4"]
    assert main(["plan", *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == "warning: plan: mixtral cannot hold this model: take convert.target=qwen3_moe\n"
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[-1].startswith("✗ qwen2_moe qk_norm is True")
    assert {"✓ qwen3_moe", "targets"} <= set(lines)
    assert not any("in other engines" in line or line.startswith(("on disk", "note:")) for line in lines)
    assert main(["plan", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["portability"] == []
    code, err = fails(capsys, "convert", *arguments, "--out", str(tmp_path / "run"))
    assert (code, err.endswith("norm on queries and keys (hint: convert.target=qwen3_moe holds it)")) == (2, True)
    assert main(["plan", *arguments, "convert.target=qwen3_moe"]) == 0
    out, err = capsys.readouterr()
    assert (err, "qwen3_moe in other engines" in out) == ("", True)


def test_json_is_one_object_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    source = str(finished()[0] / "dense")
    assert main(["plan", source, "plan.num_experts=4", "--json", "plan.top_k=1", "--seed", "9"]) == 0
    out, err = capsys.readouterr()
    assert (err, out.count("\n")) == ("", 1)
    found = json.loads(out)
    assert (found["verb"], found["seed"], found["shape"]["top_k"]) == ("plan", 9, 1)
    # embeddings, 3 layers of (attention + FFN + norms), the last norm: 4 heads of 16, 2 of them for keys and values
    dense = 2 * 128 * 64 + 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96 + 2 * 64) + 64
    assert found["account"]["dense_parameters"] == dense
    assert found["account"]["total_parameters"] == dense + 3 * 4 * 64  # the routers
    assert found["account"]["active_parameters"] == dense + 3 * 4 * 64 - 3 * 3 * 3 * 64 * 24


def test_json_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "no/where", "--json", "--offline"]) == 3
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["exit_code"] == 3
    assert err == f"prismoe: {found['error']}\n"
    assert found["error"].startswith("no/where: no such folder, and not in the hub cache")


def test_a_run_folder_can_be_named_instead_of_its_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    assert main(["eval", str(out)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    score = json.loads((out / "scores.json").read_text())["scores"]
    stories = [row for row in score if row["domain"] == "stories"]
    numbers = [f"{row['perplexity']:,.2f}" for row in stories] + [f"{row['bits_per_byte']:.3f}" for row in stories]
    assert " ".join(["stories", *numbers]) in lines
    assert main(["run", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("(finished before)") == 8


def test_show_knows_what_it_looks_at(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = finished()[0]
    kinds = {
        "run": folder / "run",
        "model": folder / "run" / "moe",
        "plan": copy_of(tmp_path) / "plan.safetensors",  # its picture is drawn beside it
        "domain": folder / "run" / "data" / "code",
        "config": folder / "config.yaml",
    }
    for kind, path in kinds.items():
        assert main(["show", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == kind
        assert main(["show", str(path)]) == 0
        assert capsys.readouterr().out
    assert main(["show", str(folder / "run" / "moe"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_experts"], found["top_k"], found["certificate"]["passed"]) == (4, 2, True)
    assert found["parameters"] - found["active_parameters"] == 3 * 2 * 3 * 64 * 32  # 2 idle experts, 32 wide on disk
    assert main(["show", str(tmp_path)]) == 3


def test_verify_takes_any_converted_folder_and_a_fault_is_code_5(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, out = finished()[0], copy_of(tmp_path)
    moe = str(out / "moe")
    assert main(["verify", moe, f"source={folder / 'dense'}", "verify.tokens=24"]) == 0
    assert "checks hold" in capsys.readouterr().out
    weights = out / "moe" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    code, err = fails(capsys, "verify", moe, f"source={folder / 'dense'}", "--force")
    assert code == 5
    assert "check 'files' failed" in err


def test_resources_and_interruption_have_their_codes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    strange = tmp_path / "run" / "moe"
    strange.mkdir(parents=True)
    (strange / "mine.txt").write_text("x")
    code, err = fails(capsys, "convert", str(finished()[0] / "config.yaml"), "--out", str(tmp_path / "run"))
    assert (code, "output folder holds something else" in err) == (4, True)


def test_a_stopped_run_is_code_75_and_the_same_command_goes_on(tmp_path: Path) -> None:
    path = workplace(tmp_path)
    path.write_text(path.read_text().replace("steps: 6", "steps: 2000").replace("max_epochs: 50", "max_epochs: 9999"))
    log = tmp_path / "run" / "train" / "metrics.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "prismoe", "run", str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_text().count('"step"') > 8:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.2)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75, err
    assert err.strip().splitlines()[-1].startswith(f"prismoe: {tmp_path}/run/train: stopped by SIGINT after step")
    again = command("run", str(path), "--dry-run")
    assert again.returncode == 0, again.stderr


def test_some_steps_at_a_time_and_the_lines_that_launch_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What is typed for one process is what the launchers are told to type for many."""
    folder = copy_of(tmp_path)
    typed = ["pretrain", str(folder), "pretrain.lr=0.002"]
    code, err = fails(capsys, *typed, "--max-steps", "2", "--force")
    assert (code, "stopped by max_steps after step 2 of 6" in err) == (75, True)
    assert main([*typed, "--dry-run", "--json", "--seed", "3"]) == 0
    launch = json.loads(capsys.readouterr().out)["launch"]
    assert launch["torchrun"].endswith(
        f" -m prismoe pretrain {folder}/run.yaml pretrain.lr=0.002 --out {folder} --seed 3"
    )


def test_debug_shows_the_traceback_and_nothing_else_does(tmp_path: Path) -> None:
    assert "Traceback" not in command("plan", str(tmp_path)).stderr
    assert "Traceback" in command("plan", str(tmp_path), "--debug").stderr


def test_doctor_is_paste_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    import torch

    assert found["sections"]["packages"]["torch"] == torch.__version__
    assert found["sections"]["system"]["cores"].endswith(f"of {os.cpu_count()}")
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    private = {os.uname().nodename, str(Path.cwd()), str(Path.home())} - {"", "/", "localhost"}
    assert [name for name in private if name in page] == []


def test_a_reader_that_leaves_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "prismoe", "doctor"], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (process.returncode, "Traceback" in process.stderr, "BrokenPipe" in process.stderr) == (0, False, False)


def in_terminal(*arguments: str, **environment: str) -> str:
    """What a command writes when stdout and stderr are a terminal of 100 columns."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "prismoe", *arguments],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(theirs)
    chunks = []
    try:
        while chunk := os.read(ours, 65536):
            chunks.append(chunk)
    except OSError:  # Linux says so when the last writer has gone
        pass
    process.wait(timeout=60)
    os.close(ours)
    return b"".join(chunks).decode()


def test_colour_is_for_terminals_that_want_it() -> None:
    source = str(finished()[0] / "dense")
    green = "\x1b[32m"
    assert green in in_terminal("plan", source, "plan.num_experts=4")
    assert green not in in_terminal("plan", source, "plan.num_experts=4", NO_COLOR="1")
    plain = command("plan", source, "plan.num_experts=4").stdout
    assert "\x1b" not in plain
    assert all(line == line.rstrip() for line in plain.splitlines())


def test_bars_move_in_a_terminal_and_a_log_stays_sober(tmp_path: Path) -> None:
    tiny_dense(tmp_path / "dense", num_hidden_layers=2)
    arguments = ["verify.tokens=8", "plan.num_experts=4", f"source={tmp_path / 'dense'}"]
    shown = in_terminal("run", *arguments, "--out", str(tmp_path / "a"))
    assert "\x1b[?25l" in shown  # the cursor is hidden while bars move
    log = command("run", *arguments, "--out", str(tmp_path / "b"))
    assert log.returncode == 0
    assert "\x1b" not in log.stdout + log.stderr
    assert "\r" not in log.stdout + log.stderr
    assert [line.split()[1] for line in log.stdout.splitlines()] == ["plan", "convert", "verify", "report"]
    assert log.stderr == ""


def test_a_run_without_the_packages_of_the_report_says_so(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    code = "import sys; sys.modules['matplotlib'] = None; import prismoe.cli; sys.exit(prismoe.cli.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "run", str(out)]
    found = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert found.returncode == 0
    assert (
        "warning: report: not written, jinja2 or matplotlib is missing: pip install 'prismoe[report]'" in found.stderr
    )
    arguments[3] = "report"
    found = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (found.returncode, "not installed; needed pip install 'prismoe[report]'" in found.stderr) == (4, True)


def test_a_dry_run_leaves_nothing_or_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("reference-loss", "train-filter"):
        assert main([verb, "--dry-run", "--out", str(tmp_path / "out")]) == 2
        assert (
            f"--dry-run with {verb}; needed a verb that takes it (hint: prismoe {verb} --help)"
            in capsys.readouterr().err
        )
    assert main(["demo", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert list(tmp_path.iterdir()) == []


def test_an_argument_of_another_method_is_not_suggested_to_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("plan: {method: gradient, mode: inter}\n")
    assert main(["plan", str(path), "plan.method=coactivation"]) == 2
    told = capsys.readouterr().err
    assert "unknown key plan.mode" in told
    assert "did you mean plan.mode?" not in told


def test_verify_says_when_there_is_nothing_to_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path / "nowhere")]) == 3
    assert "nowhere: nothing to verify; needed a config, a run folder or a folder that" in capsys.readouterr().err
