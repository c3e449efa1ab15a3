"""A whole small run, made once per test process: a tiny dense LLaMA, two domains of sentences, a few training steps."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

from prismoe.config import Config, load_config
from prismoe.run import Done, run
from tests.tiny import TEXT, tiny_dense

CONFIG = """\
source: {folder}/dense
out: {folder}/run
seed: 3
plan: {{num_experts: 4, top_k: 2}}
verify: {{tokens: 24}}
data:
  domains:
    stories: {{train: "{folder}/stories*.jsonl"}}
    code: {{train: "{folder}/code.txt", heldout: "{folder}/heldout.txt"}}
  heldout_fraction: 0.2
  weights: {{stories: 0.75, code: 0.25}}
pretrain:
  {{steps: 6, seq_len: 16, batch_size: 4, warmup_steps: 2, eval_every: 3, eval_tokens: 200, max_epochs: 50, threads: 1}}
eval: {{max_tokens: 200, batch_size: 4}}
"""


def workplace(folder: Path) -> Path:
    """Fill `folder` with a dense model and text, and return the path of the config of a run over them."""
    tiny_dense(folder / "dense")
    documents = [{"content": f"{TEXT[0]} {TEXT[2]} The {number}. time."} for number in range(40)]
    for index in range(2):
        lines = "\n".join(json.dumps(document) for document in documents[index::2])
        (folder / f"stories{index}.jsonl").write_text(lines)
    (folder / "code.txt").write_text("\n".join(f"{TEXT[1]} {number}" for number in range(30)))
    (folder / "heldout.txt").write_text("\n".join(f"def sub(first, second): return {number}" for number in range(9)))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=folder))
    return path


@cache
def finished() -> tuple[Path, tuple[Done, ...]]:
    """(folder, stages) of a finished run; look, do not write: `copy_of` is for that."""
    folder = Path(tempfile.mkdtemp(prefix="prismoe-run-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, run(load_config(workplace(folder))).stages


def copy_of(folder: Path) -> Path:
    """A copy of the finished run folder that a test may change."""
    return Path(shutil.copytree(finished()[0] / "run", folder / "run"))


def config(*overrides: str, out: Path | None = None) -> Config:
    """The config of the finished run, changed."""
    folder = finished()[0]
    fixed = {} if out is None else {"out": str(out)}
    return load_config(folder / "config.yaml", overrides=overrides, **fixed)
