"""`show` of prepared domains, of a config and of training, finished or not: the figures are the mixture's own."""

import json
from pathlib import Path

import pytest

from prismoe.cli import main
from prismoe.data.mixture import Mixture
from prismoe.errors import InputError, InterruptedRun, UsageError
from prismoe.reference import find_domains
from prismoe.run import run
from prismoe.showmixture import describe_trained, draw_weights
from prismoe.train.metrics import read_metrics
from tests.runs import config, copy_of, finished, workplace
from tests.test_mixture import numbered


def test_prepared_domains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    domains = [numbered(tmp_path / "data" / name, size) for name, size in (("a", 1600), ("b", 16000))]
    options = ["weights={a: 0.5, b: 0.5}", "steps=100", "seq_len=16", "batch_size=8", "max_epochs=2"]
    picture = tmp_path / "weights.png"
    assert main(["show", str(tmp_path / "data"), *options, "--json", "--out", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    mixture = Mixture(domains, weights={"a": 0.5, "b": 0.5}, seq_len=16, batch_size=8, max_epochs=2)
    a, b = found["domains"]
    assert (a["available"], b["available"]) == (1600, 16000)
    assert a["epochs"] == mixture.report(100)[0].epochs == 4.0  # 4 rows a step, 100 windows
    assert (a["full_at"], b["full_at"]) == (50, None)
    mixture.check(50)
    with pytest.raises(UsageError, match="from step 50 on"):
        mixture.check(51)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert main(["show", str(tmp_path / "data"), *options]) == 0
    assert "over 2 epochs at step" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"needed .png or .svg"):
        draw_weights(found, tmp_path / "weights.txt")


def test_a_config_draws_the_mixture_it_would_train_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base, picture = finished()[0], tmp_path / "weights.svg"
    assert main(["show", str(base / "config.yaml"), "--json", "--out", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "config"
    mixed = found["mixture"]
    domains = find_domains(base / "run")
    mixture = Mixture(domains, weights={"stories": 0.75, "code": 0.25}, seq_len=16, batch_size=4, max_epochs=50)
    assert (mixed["steps"], mixed["rule"]) == (6, "static")
    assert {row["name"]: (row["weight"], row["tokens"], row["epochs"]) for row in mixed["domains"]} == {
        share.name: (share.requested, share.tokens, share.epochs) for share in mixture.report(6)
    }
    assert b"stories" in picture.read_bytes()
    assert main(["show", str(base / "config.yaml")]) == 0
    assert "6 steps of 4 × 16: 384 tokens" in capsys.readouterr().out


def test_a_config_whose_domains_are_not_prepared_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = workplace(tmp_path)
    assert main(["show", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "no mixture" in line] == [
        f"no mixture to draw yet, it needs {tmp_path}/run/data/{name} (`prismoe prepare` makes it)"
        for name in ("stories", "code")
    ]
    path.write_text(path.read_text().replace(f"out: {tmp_path}/run\n", ""))
    assert main(["show", str(path)]) == 0
    assert "it needs `out:`, the run folder with the prepared domains" in capsys.readouterr().out
    assert main(["show", str(path), "--out", str(tmp_path / "weights.png")]) == InputError.exit_code
    assert "no mixture to draw yet" in capsys.readouterr().err


def test_a_finished_training_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder, stages = finished()
    receipt = next(done.receipt for done in stages if done.stage == "pretrain")
    found = describe_trained(folder / "run" / "train")
    assert [(found[key], found["planned"]) for key in ("steps",)] == [(6, 6)]
    assert found["recommended"] == receipt["weights"] == {"stories": 0.75, "code": 0.25}
    for row, share in zip(found["domains"], receipt["mixture"], strict=True):
        assert {key: row[key] for key in ("name", "requested", "achieved", "tokens", "epochs")} == {
            key: share[key] for key in ("name", "requested", "achieved", "tokens", "epochs")
        }
        assert row["weight"] == row["last"] == share["requested"]
    assert main(["show", str(folder / "run" / "train")]) == 0
    assert "not finished" not in capsys.readouterr().out
    with pytest.raises(InputError, match="not a training folder"):
        describe_trained(folder / "dense")


def test_training_that_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped after 5 of 6 steps, the weights moved before steps 2 and 4: figures are the mixture's under both."""
    out = copy_of(tmp_path)
    moving = ["pretrain.mixing=sheared", "pretrain.mixing_every_tokens=128", "pretrain.reference={stories: 1, code: 4}"]
    stopped = config(*moving, "pretrain.max_steps=5", out=out)
    with pytest.raises(InterruptedRun):
        run(stopped, stages=("pretrain",), force=True)
    assert main(["show", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["mixture"]
    assert (found["steps"], found["planned"], found["rule"]) == (5, 6, "sheared")
    moves = [line for line in read_metrics(out / "train/metrics.jsonl") if line["event"] == "mixing"]
    assert [entry["step"] for entry in found["history"]] == [0, 2, 4]
    mixture = Mixture(find_domains(out), weights={"stories": 0.75, "code": 0.25}, seq_len=16, batch_size=4, seed=3)
    for line in moves:
        mixture.set_weights(line["step"], line["after"])
    for row, share in zip(found["domains"], mixture.report(5), strict=True):
        assert (row["name"], row["requested"], row["tokens"]) == (share.name, share.requested, share.tokens)
        assert row["last"] == moves[-1]["after"][row["name"]] != row["weight"]
    assert main(["show", str(out / "train")]) == 0
    assert "5 steps of 4 × 16: 320 tokens; not finished, 6 are planned" in capsys.readouterr().out
    # A copy of the training folder alone still has its weights.
    alone = (out / "train").rename(tmp_path / "alone")
    row = describe_trained(alone)["domains"][0]
    assert (row["achieved"], row["last"]) == (None, found["domains"][0]["last"])
    assert main(["show", str(alone)]) == 0
