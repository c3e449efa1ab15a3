"""How the demo's parent model was made: text, tokenizer, config, training from scratch, bf16 weights.

    python examples/train_parent.py --out runs/parent             # about an hour on one core
    cp runs/parent/shipped/* prismoe/demo/parent/

The text is what the running CPython carries, so weights differ a little between Python versions; the shipped
ones were made with the versions written in `prismoe/demo/parent/training.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import prismoe
from prismoe.data.reader import read_documents
from prismoe.demo.text import write_domains

VOCAB_SIZE = 2048
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "pretraining_tp": 1,
    "use_cache": True,
    "dtype": "float32",
    "torch_dtype": "float32",
}


def train_tokenizer(texts: list[str], out: Path, vocab_size: int) -> None:
    """Byte-level BPE of `vocab_size` pieces, the same weight for each domain's text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    longest = max(map(len, texts))
    tokenizer.train_from_iterator([text for text in texts for _ in range(longest // len(text))], trainer)
    tokenizer.save(str(out / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (out / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    args = parser.parse_args()
    out: Path = args.out

    start = out / "start"  # a folder with a config and a tokenizer, and no weights yet
    start.mkdir(parents=True, exist_ok=True)
    text = write_domains(out / "text")
    if not (start / "tokenizer.json").exists():
        texts = ["".join(document.text for document in read_documents(train)) for train, _ in text.values()]
        train_tokenizer(texts, start, VOCAB_SIZE)
    (start / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")

    prepared = prismoe.prepare(
        {
            name: prismoe.DomainSource(train=(str(train),), heldout=(str(heldout),))
            for name, (train, heldout) in text.items()
        },
        tokenizer=start,
        out=out / "data",
    )
    settings = prismoe.PretrainConfig(
        init="random", steps=args.steps, batch_size=8, seq_len=512, lr=3e-3, warmup_steps=200, min_lr_ratio=0.05,
        precision="bf16", threads=1, eval_every=500, save_every=250, max_epochs=20,
    )  # fmt: skip
    trained = prismoe.pretrain(
        start,
        settings,
        domains=[domain.folder for domain in prepared.domains],
        weights={"code": 0.65, "docstrings": 0.25, "reference": 0.10},
        out=out / "train",
        on_progress=lambda what, done, total: print(f"{what} {done}/{total}") if done % 20 == 0 else None,
    )
    assert trained is not None
    ship(out, trained, CONFIG)


def ship(out: Path, trained: prismoe.Trained, config: dict[str, Any]) -> None:
    """The folder to keep: bf16 weights, and what they were made with."""
    folder = out / "shipped"
    folder.mkdir(exist_ok=True)
    weights = {
        name: tensor.to(torch.bfloat16) for name, tensor in load_file(trained.model / "model.safetensors").items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((out / "start" / name).read_bytes())
    record = {
        "tokens": trained.tokens,
        "tokens_by_domain": {share["name"]: share["tokens"] for share in trained.mixture},
        "heldout_loss": trained.heldout_after,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
