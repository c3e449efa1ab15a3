"""Every target in stock transformers 5 and 4.57, against the dense model with the formula in place of its MLP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.plan import Plan, make_plan, plan_shape
from prismoe.targets import find_target
from tests import golden

TOLERANCE = 2e-5  # max |Δlogit| in float32 where logits reach about 7


@dataclass(frozen=True)
class Made:
    """One converted case and what its reference computes."""

    folder: Path
    logits: np.ndarray
    greedy: np.ndarray
    dense_logits: np.ndarray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every case of `golden.CASES`, converted once."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("golden")
    sources: dict[str, Path] = {}
    cases: dict[str, Made] = {}
    for number, (case, (source, target, arguments)) in enumerate(golden.CASES.items()):
        if source not in sources:
            sources[source] = golden.make_source(root / f"dense{len(sources)}", source)
        folder = root / f"case{number}"
        plan = make_plan(sources[source], **arguments)
        routers = build(sources[source], plan, target, folder)
        logits, greedy = golden.compute(golden.reference(sources[source], plan, routers))
        dense = AutoModelForCausalLM.from_pretrained(sources[source], dtype="float32").eval()
        cases[case] = Made(folder, logits, greedy, golden.compute(dense)[0])
    return cases


def build(source: Path, plan: Plan, target: str, out: Path) -> dict[int, np.ndarray]:
    """Convert into `out`; returns the router rows of each MoE layer."""
    convert(source, plan, target=target, out=out)
    written, key = Checkpoint.open(out), find_target(target).router
    return {index: np.array(written.array(key.format(l=index)), np.float32) for index in plan_shape(plan).moe_layers}


@pytest.fixture(scope="module")
def old_transformers(made: dict[str, Made], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same folders in transformers 4.57, in a process of its own."""
    library = os.environ.get("PRISMOE_TF4", "")
    if not Path(library, "transformers").is_dir():
        pytest.skip("PRISMOE_TF4 does not name a folder with transformers 4.57 (make test installs it)")
    out = tmp_path_factory.mktemp("old") / "found.npz"
    command = [sys.executable, golden.__file__, str(out), *(str(case.folder) for case in made.values())]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": library}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(out) as found:
        assert str(found["version"]).startswith("4.57.")
        return {key: found[key] for key in found.files}


@pytest.mark.parametrize("case", golden.CASES)
def test_stock_transformers_5_computes_the_formula(made: dict[str, Made], case: str) -> None:
    expected = made[case]
    model, misfits = golden.load(expected.folder)
    assert misfits == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    logits, greedy = golden.compute(model)
    assert 4 < np.abs(expected.logits).max() < 40
    assert np.abs(logits - expected.logits).max() <= TOLERANCE
    assert greedy.tolist() == expected.greedy.tolist()


@pytest.mark.parametrize("case", golden.CASES)
def test_transformers_4_57_computes_the_same(
    made: dict[str, Made], old_transformers: dict[str, Any], case: str
) -> None:
    expected, name = made[case], made[case].folder.name
    misfits = json.loads(str(old_transformers[f"{name}/misfits"]))
    assert misfits == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    assert np.abs(old_transformers[f"{name}/logits"] - expected.logits).max() <= TOLERANCE
    assert old_transformers[f"{name}/greedy"].tolist() == expected.greedy.tolist()


@pytest.mark.parametrize("case", golden.CASES)
def test_upcycled_is_the_dense_model_and_a_partition_is_not(made: dict[str, Made], case: str) -> None:
    difference = np.abs(made[case].logits - made[case].dense_logits).max()
    if golden.CASES[case][2]["method"] == "upcycle":
        assert difference <= TOLERANCE
    else:
        assert difference > 0.1
