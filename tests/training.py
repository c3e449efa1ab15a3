"""What training tests train: domains of a fixed random grammar in the shard format, and small stock mixtures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from prismoe.data.shards import token_dtype
from prismoe.folder import Manifest, hash_files, sha256_file
from tests.tiny import tiny_tokenizer

END = 2


def domain_folder(
    folder: Path, *, tokenizer: Path, vocab_size: int = 128, documents: int = 60, length: int = 100, seed: int = 0
) -> Path:
    """A finished domain named like `folder`; every id has four likely successors, different for each `seed`."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    successors = draw.integers(3, vocab_size, (vocab_size, 4))
    splits = {}
    for split, count in (("train", documents), ("heldout", max(3, documents // 10))):
        ids: list[int] = []
        ends = []
        for document in range(count):
            token = int(draw.integers(3, vocab_size))
            for _ in range(length):
                ids.append(token)
                token = int(successors[token, draw.integers(0, 4)])
            ids.append(END)
            ends.append((len(ids), 3 * length * (document + 1)))
        np.array(ids, token_dtype(vocab_size)).tofile(folder / f"{split}.tokens")
        np.array(ends, "<i8").tofile(folder / f"{split}.ends")
        splits[split] = {
            "num_tokens": len(ids),
            "num_documents": count,
            "num_bytes": 3 * length * count,
            "num_unknown": 0,
        }
    config = {
        "name": folder.name,
        "vocab_size": vocab_size,
        "start_token": 1,
        "end_token": END,
        "tokenizer_sha256": sha256_file(tokenizer),
        "splits": splits,
        "shards": {split: [{"name": split, "counts": counts}] for split, counts in splits.items()},
    }
    files = hash_files(folder, [f"{split}.{part}" for split in splits for part in ("tokens", "ends")])
    Manifest(kind="domain", parents={}, config=config, files=files).write(folder)
    return folder


def tiny_moe(folder: Path, model_type: str = "mixtral", *, seed: int = 0, top_k: int = 2, **overrides: Any) -> Path:
    """Save a mixture of 4 experts of width 32 in a stock class: 2 layers, hidden 64, vocabulary 128, uneven routers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "num_experts_per_tok": top_k,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    if model_type == "qwen3_moe":
        settings |= {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, "head_dim": 16}
    else:
        settings |= {"num_local_experts": 4}
    if model_type == "granitemoeshared":
        settings |= {"shared_intermediate_size": 32, "attention_multiplier": 0.25}
    config = AutoConfig.for_model(model_type, **{**settings, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    # A config as our converter writes it has spellings that the library's own writer leaves out.
    path = folder / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "rope_theta": 10000.0}, indent=1) + "\n")
    return tiny_tokenizer(folder, vocab_size=config.vocab_size)
