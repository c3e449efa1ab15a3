"""Makes a LLaMA-shaped checkpoint of any size out of random bfloat16 bytes, sharded like a real one.

python benchmarks/synthetic.py OUT --hidden 2048 --ffn 5632 --layers 22          # 2.2 GB, 5 shards
python benchmarks/synthetic.py OUT --shape 70b --sparse                          # 141 GB of shapes, no disk used
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from prismoe.checkpoint.family import dense_config, tensor_shapes
from prismoe.convert.layout import index_json, lay_out
from prismoe.recipe import Fill

BLOCK = 32 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense LLaMA."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "1b": Shape(2048, 5632, 22, 32, 4, 32000),  # TinyLlama-1.1B
    "8b": Shape(4096, 14336, 32, 32, 8, 128256),  # Llama-3-8B
    "70b": Shape(8192, 28672, 80, 64, 8, 128256),  # Llama-3-70B
}


def synthetic(out: Path, shape: Shape, *, shards: int = 5, sparse: bool = False) -> int:
    """Write the checkpoint and sync it; returns its bytes. `sparse` files hold zeros and take no disk."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    shapes = tensor_shapes(dense_config(config))
    total = sum(2 * int(np.prod(dims)) for dims in shapes.values())
    files = lay_out({key: Fill(dims, "BF16") for key, dims in shapes.items()}, {}, max_shard_bytes=-(-total // shards))
    numbers = np.random.default_rng(0).standard_normal(BLOCK // 2, np.float32) * 0.02
    block = memoryview(numbers.astype(ml_dtypes.bfloat16).view(np.uint8))
    for file in files:
        with (out / file.name).open("wb") as handle:
            handle.write(file.header)
            if sparse:
                handle.truncate(file.nbytes)
            else:
                left = file.nbytes - len(file.header)
                while left:
                    left -= handle.write(block[: min(left, BLOCK)])
            handle.flush()
            os.fsync(handle.fileno())
    if len(files) > 1:
        (out / "model.safetensors.index.json").write_text(json.dumps(index_json(files)))
    return sum(file.nbytes for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    for name in ("hidden", "ffn", "layers", "heads", "kv-heads", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="instead of the shape's")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--sparse", action="store_true", help="holes instead of numbers: shapes without disk")
    given = parser.parse_args()
    base = SHAPES[given.shape]
    shape = Shape(**{name: getattr(given, name) or value for name, value in vars(base).items()})
    print(f"{given.out}: {synthetic(given.out, shape, shards=given.shards, sparse=given.sparse) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
