"""The portability table against the engines themselves: `make test-engines` (not part of `make test`).

Every golden case and real conversions of stories260K go through llama.cpp (its converter, then its float32 forward) and
MLX on the CPU, in an environment of their own. What the table says of an engine has to be what the engine does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.convert import convert
from prismoe.plan import PlanShape, make_plan, plan_shape
from prismoe.portability import portability
from prismoe.target import absorbed
from tests import engines, golden

pytestmark = pytest.mark.engines
TOLERANCE = 1e-4
REAL = {
    "mixtral": {"num_experts": 4},
    "granitemoe": {"num_experts": 4},
    "granitemoeshared": {"num_experts": 4, "shared": 44},
    "granitemoehybrid": {"num_experts": 4, "shared": 44},
    "granitemoe_swa": {"num_experts": 4, "shared": 44},
    "qwen2_moe": {"num_experts": 4, "shared": 44},
    "glm4_moe": {"num_experts": 4, "shared": 44},
}
CASES = {**golden.CASES, **{f"stories260K -> {name}": ("stories260K", name, row) for name, row in REAL.items()}}


@dataclass(frozen=True)
class Made:
    """One conversion, what stock transformers computes from it, and what the table says."""

    folder: Path
    logits: Any
    greedy: Any
    verdicts: dict[str, str]


@pytest.fixture(scope="module")
def made(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    root, real = tmp_path_factory.mktemp("engines"), shared / "models/stories260K"
    np.save(root / "ids.npy", golden.prompt()[0].numpy())
    sources = {"stories260K": real}
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for number, (case, (name, target, arguments)) in enumerate(CASES.items()):
            if name not in sources:
                source = golden.SOURCES[name]
                wide = replace(source, overrides={**source.overrides, "vocab_size": 512})
                patch.setitem(golden.SOURCES, name, wide)  # room for a tokenizer that llama.cpp's converter can read
                sources[name] = golden.make_source(root / f"dense{number}", name)
                shutil.copy(real / "tokenizer.model", sources[name])
            options = {key: value for key, value in arguments.items() if key != "absorb"}
            plan, absorb = make_plan(sources[name], **{"router_std": 0.3, **options}), "absorb" in arguments
            folder = root / f"case{number}"
            convert(sources[name], plan, target=target, out=folder, absorb=absorb)
            shape: PlanShape = absorbed(plan_shape(plan)) if absorb else plan_shape(plan)
            rows = portability(Checkpoint.open(sources[name]).family, shape, target)
            logits, greedy = golden.compute(golden.load(folder)[0])
            found[case] = Made(folder, logits, greedy, {row.engine: row.verdict for row in rows})
    return found


def run(engine: str, made: dict[str, Made], scratch: Path) -> dict[str, Any]:
    """What one engine made of all folders."""
    python = os.environ.get("PRISMOE_ENGINES", "")
    if not Path(python).is_file():
        pytest.skip("PRISMOE_ENGINES does not name the python of an environment with the engines (make test-engines)")
    folders = [str(row.folder) for row in made.values()]
    ids = str(Path(folders[0]).parent / "ids.npy")
    command = [python, engines.__file__, engine, ids, str(scratch / "found.npz"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(scratch / "found.npz") as found:
        return {key: found[key] for key in found.files}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("engine", ["gguf", "mlx"])
def test_the_table_says_what_the_engine_does(engine: str, made: dict[str, Made], tmp_path: Path) -> None:
    found = run(engine, made, tmp_path)
    wrong, seen = [], set()
    for case, row in made.items():
        name, said = row.folder.name, row.verdicts[engine]
        seen.add(said)
        if f"{name}/error" in found:
            did, note = "refused", str(found[f"{name}/error"])
        else:
            off = float(np.abs(found[f"{name}/logits"][:, : row.logits.shape[1]] - row.logits).max())
            right = off <= TOLERANCE and found[f"{name}/greedy"].tolist() == row.greedy.tolist()
            did, note = "runs" if right else "wrong", f"logits off by {off:.1e}"
        if said not in (did, "unknown"):
            wrong.append(f"{case}: the table says {said}, it {did}: {note}")
    assert wrong == []
    assert {"runs", "refused", "wrong"} <= seen  # an engine that is given nothing to fail on proves nothing
