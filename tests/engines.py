"""Loads converted folders with an independent engine, a script for that engine's own environment; saves what came.

`python tests/engines.py gguf|mlx IDS.npy OUT.npz FOLDER...` writes for each folder either logits [T, V] and the greedy
tokens, or the last line of what the engine said. llama.cpp reads through its own converter (in PRISMOE_LLAMA_CPP).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NUM_GREEDY = 20
Logits = Callable[[list[int]], Any]


def gguf(folder: Path, scratch: Path) -> Logits:
    """llama.cpp in float32, with a fresh cache for every call."""
    from llama_cpp import Llama

    out = scratch / f"{folder.name}.gguf"
    sys.path.insert(0, os.environ["PRISMOE_LLAMA_CPP"])
    import convert_hf_to_gguf
    from conversion.base import TextModel

    # It knows tokenizers of released models by their hash. How text is split decides no logit of given ids.
    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
    sys.argv = ["convert_hf_to_gguf.py", str(folder), "--outtype", "f32", "--outfile", str(out)]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as error:
        raise RuntimeError("its converter gives up") from error
    kinds = {"type_k": 0, "type_v": 0}  # its cache is float16 unless told: enough to choose other experts
    model = Llama(str(out), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False, **kinds)
    size = model.n_vocab()

    def logits(ids: list[int]) -> Any:
        model.reset()
        model.eval(ids)
        return np.array(model.scores[: len(ids), :size])

    return logits


def mlx(folder: Path, scratch: Path) -> Logits:
    """mlx-lm in float32 on the CPU."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return lambda ids: np.array(model(mx.array([ids]))[0].astype(mx.float32))


def main(engine: str, ids_file: Path, out: Path, folders: list[Path]) -> None:
    """Run one engine over all folders."""
    found: dict[str, Any] = {}
    prompt = [int(number) for number in np.load(ids_file)]
    with tempfile.TemporaryDirectory() as scratch:
        for folder in folders:
            try:
                logits = {"gguf": gguf, "mlx": mlx}[engine](folder, Path(scratch))
                ids = list(prompt)
                first = logits(ids)
                while len(ids) < len(prompt) + NUM_GREEDY:
                    ids.append(int(logits(ids)[-1].argmax()))
            except Exception as error:  # noqa: BLE001 - what an engine refuses is a result
                said = f"{type(error).__name__}: {error}".strip().splitlines()
                found[f"{folder.name}/error"] = np.array(said[-1][:300])
                continue
            found[f"{folder.name}/logits"], found[f"{folder.name}/greedy"] = first, np.array(ids[len(prompt) :])
    np.savez(out, **found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), [Path(name) for name in sys.argv[4:]])
