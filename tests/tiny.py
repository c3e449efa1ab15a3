"""Small real checkpoints: random weights in a stock class, saved by stock transformers, with a small real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = (
    "Once upon a time there was a little girl who liked to play in the park with her big red ball.",
    "def add(first, second): return first + second  # the sum of two numbers",
    "The king said: no one may enter the old tower before the sun is up!",
)


def tiny_tokenizer(folder: Path, *, vocab_size: int = 128) -> Path:
    """Train a BPE tokenizer on a few sentences and save `tokenizer.json` and `tokenizer_config.json` into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def tiny_settings(family: str) -> dict[str, Any]:
    """Keys of the stock config of a small model of `family`."""
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    if family in ("ernie4_5", "hunyuan_v1_dense", "qwen3"):  # their default is no hidden_size / num_heads
        settings["head_dim"] = 16
    if family == "mistral":
        settings["sliding_window"] = None
    return settings


def tiny_dense(folder: Path, family: str = "llama", *, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Save a dense checkpoint: hidden 64, FFN 96, 3 layers, 4 heads with 2 key-value heads, vocabulary 128.

    The weights are large enough (logits reach about 7) and the norm gains uneven enough for a wrong scale,
    a swapped matrix or a lost bias to show. `overrides` are keys of the stock config.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **{**tiny_settings(family), **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(0, config.vocab_size, (1, 40), generator=generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = name.endswith("norm.weight")
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.2 * noise if gain else 0.12 * noise)
        model.model.norm.weight *= 7 / model(ids).logits.abs().max()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return tiny_tokenizer(folder, vocab_size=config.vocab_size)
