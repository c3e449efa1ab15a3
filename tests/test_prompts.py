"""Prompts through the stock model: the mean FFN inputs of the whole model, and router rows that tell them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from prismoe.calibrate.prompts import prompt_states
from prismoe.errors import UsageError
from prismoe.plan import make_plan
from tests.tiny import tiny_dense

PROMPTS = [["once upon a time", "the little girl liked her ball"], ["def add(first, second):"], ["the king said: no"]]


def whole_model(folder: Path, prompts: list[list[str]]) -> np.ndarray:
    """[L, E, D] by hooks on the stock model, prompt by prompt."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    caught: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: caught.append(args[0][0].mean(dim=0).numpy()))
    found = []
    for group in prompts:
        rows = []
        for text in group:
            caught.clear()
            with torch.no_grad():
                model(input_ids=torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids]))
            rows.append(np.stack(caught))
        found.append(np.mean(rows, axis=0))
    return np.stack(found, axis=1)


def test_states_are_those_of_the_whole_model(tmp_path: Path) -> None:
    dense = tiny_dense(tmp_path / "dense")
    path = prompt_states(dense, PROMPTS, out=tmp_path / "states.safetensors")
    found = load_file(path)
    expected = whole_model(dense, PROMPTS)
    for layer in range(3):
        np.testing.assert_allclose(found[f"layers.{layer}.inputs"], expected[layer], atol=1e-5)
    plan = make_plan(dense, method="upcycle", num_experts=3, top_k=1, router="prompts", prompt_states=str(path))
    for layer, made in enumerate(plan.layers):
        assert made is not None
        states = expected[layer] / np.linalg.norm(expected[layer], axis=1, keepdims=True)
        assert (states @ np.asarray(made.router).T).argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompts", "line"),
    [
        ([["a b"], []], "prompts: expert 1 has an empty prompt or none; needed some text each"),
        ([["a b"], [" \n"]], "prompts: expert 1 has an empty prompt or none; needed some text each"),
        ([["a", "b"], ["c"], ["b", "a"]], "prompts: experts 0 and 2 have the same prompts; needed different ones"),
    ],
)
def test_prompts_that_say_nothing_are_refused(prompts: list[list[str]], line: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        prompt_states(tmp_path, prompts, out=tmp_path / "out")
    assert str(caught.value) == line
