"""Small prepared domains written straight in the shard format: ids of a fixed random grammar, so there is something to learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prismoe.data.shards import token_dtype
from prismoe.folder import Manifest, hash_files, sha256_file

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
    }
    files = hash_files(folder, [f"{split}.{part}" for split in splits for part in ("tokens", "ends")])
    Manifest(kind="domain", parents={}, config=config, files=files).write(folder)
    return folder
