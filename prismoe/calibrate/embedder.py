"""Sentence embeddings for data clusters, from a stock encoder (LLaMA-MoE clusters those of all-mpnet-base-v2)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prismoe.calibrate.text import Text
from prismoe.errors import InputError
from prismoe.folder import sha256_file
from prismoe.panics import read_tokenizer
from prismoe.progress import Progress

__all__ = ["encoder_fingerprint", "sentence_vectors"]

MOST_TOKENS = 384  # of a text: where all-mpnet-base-v2 cuts
_UNUSED = ("pooler.", "embeddings.position_ids")


def encoder_fingerprint(folder: Path) -> str:
    """sha256 over what decides its vectors.

    Raises:
        InputError: not a folder with config.json, model.safetensors and tokenizer.json.
    """
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            needed = "config.json, model.safetensors and tokenizer.json of a stock encoder"
            raise InputError(f"no {name}", where=f"encoder {folder}", needed=needed)
        digest.update(sha256_file(folder / name).encode())
    return digest.hexdigest()


def sentence_vectors(
    encoder: Path, text: Text, *, source: Path, device: str, batch_size: int, on_progress: Progress
) -> npt.NDArray[np.float32]:
    """[N, D] one unit vector per sequence: the mean last hidden state of the encoder over its tokens.

    The ids go back to text through the tokenizer of `source` and into the encoder's through its own. Remote code and
    pickles are refused.

    Raises:
        InputError: a tokenizer.json is missing or unreadable, or the encoder is not a whole stock model.
    """
    import torch

    model = _load(encoder).to(device)
    back, forth = _tokenizer(source), _tokenizer(encoder)
    positions = int(getattr(model.config, "max_position_embeddings", MOST_TOKENS + 2))
    forth.enable_truncation(min(MOST_TOKENS, positions - 2))  # two: RoBERTa and MPNet count positions from 2
    forth.enable_padding(pad_id=model.config.pad_token_id or 0)
    vectors = []
    for first in range(0, len(text), batch_size):
        ids_BT = text.ids(first, min(first + batch_size, len(text)))
        encoded = forth.encode_batch(back.decode_batch(ids_BT.tolist(), skip_special_tokens=True))
        ids_BS, mask_BS = (
            torch.tensor([getattr(row, name) for row in encoded], device=device) for name in ("ids", "attention_mask")
        )
        with torch.inference_mode():
            hidden_BSD = model(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state.float()
            mean_BD = (hidden_BSD * mask_BS[:, :, None]).sum(dim=1) / mask_BS.sum(dim=1, keepdim=True).clamp(min=1)
            vectors.append(torch.nn.functional.normalize(mean_BD, dim=1).cpu().numpy())
        on_progress("embed sequences", first + len(ids_BT), len(text))
    return np.concatenate(vectors)


def _load(folder: Path) -> Any:
    import torch
    from transformers import AutoModel

    from prismoe.verify.stock import quietly

    try:
        with quietly():
            model, report = AutoModel.from_pretrained(
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:160]
        raise InputError(f"cannot be loaded ({reason})", where=f"encoder {folder}") from error
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(key) for key in report[what] if not any(part in str(key) for part in _UNUSED)):
            raise InputError(f"{what.replace('_', ' ')}: {len(names)}, such as {names[0]}", where=f"encoder {folder}")
    return model.eval()


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError("missing", where=str(path), hint="sentence embeddings need the tokenizers of both models")
    return read_tokenizer(path)
