"""`show` of prepared domains and of a trained folder: the figures are the mixture's own, and the picture is one."""

import json
from pathlib import Path

import pytest

from prismoe.cli import main
from prismoe.data.mixture import Mixture
from prismoe.errors import UsageError
from prismoe.showmixture import draw_weights
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
