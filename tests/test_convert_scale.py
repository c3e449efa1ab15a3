"""Size: 70B-shaped checkpoints lay out in seconds, memory stays where it is, nothing heavy is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.family import dense_config, tensor_shapes
from prismoe.convert.job import prepare
from prismoe.convert.layout import index_json, lay_out
from prismoe.plan import make_plan
from prismoe.recipe import Fill, Recipe
from tests.handmade import CONFIG, handmade, weights


def test_llama_70b_plans_and_lays_out_in_seconds(tmp_path: Path) -> None:
    """The real sizes of Llama-3-70B in sparse files: 141 GB of shapes, no disk."""
    config = {**CONFIG, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    fills: dict[str, Recipe] = {key: Fill(dims, "BF16") for key, dims in tensor_shapes(dense_config(config)).items()}
    shards = lay_out(fills, {}, max_shard_bytes=5_000_000_000)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index_json(shards)))
    for shard in shards:
        with (tmp_path / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.nbytes)
    job = prepare(Checkpoint.open(tmp_path), make_plan(tmp_path, num_experts=16, top_k=4), "mixtral", 32, 5_000_000_000)
    assert job.total_bytes == pytest.approx(2 * (70_553_706_496 + 80 * 16 * 8192), rel=1e-5)  # dense + routers, bf16
    assert job.memory_bytes <= 250_000_000


MEASURE = """
import sys
from pathlib import Path
from prismoe.convert import convert
from prismoe.plan import make_plan

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024

peak = 0
def look(what, done, total):
    global peak
    peak = max(peak, anonymous())

plan = make_plan(sys.argv[1], num_experts=4)
convert(sys.argv[1], plan, out=sys.argv[2], max_shard_bytes=30_000_000, on_progress=look)
print(peak)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for neurons in (4096, 32768):  # 6 MB a matrix at most, then 50 MB
        tensors = weights()
        for layer in range(2):
            for name, shape in (("gate", (neurons, 256)), ("up", (neurons, 256)), ("down", (256, neurons))):
                tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = np.zeros(shape, ml_dtypes.bfloat16)
            for name in "qkvo":
                tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = np.zeros((256, 256), ml_dtypes.bfloat16)
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(256, ml_dtypes.bfloat16)
        for name in ("model.embed_tokens", "lm_head"):
            tensors[f"{name}.weight"] = np.zeros((32, 256), ml_dtypes.bfloat16)
        tensors["model.norm.weight"] = np.ones(256, ml_dtypes.bfloat16)
        dense = handmade(tmp_path / str(neurons), tensors=tensors, hidden_size=256, intermediate_size=neurons)
        command = [sys.executable, "-c", MEASURE, str(dense), str(tmp_path / f"{neurons}-moe")]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] <= 250_000_000
    assert peaks[1] - peaks[0] <= 70_000_000  # twice the shards at a time, not 90 MB more of model


def test_planning_imports_nothing_heavy() -> None:
    code = "import sys, prismoe.convert; sys.exit(bool({'torch', 'transformers', 'safetensors'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
