"""Prompts through the stock model: the mean FFN inputs of the whole model, and router rows that tell them apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file

from prismoe.calibrate.prompts import prompt_states
from prismoe.config import load_config
from prismoe.errors import UsageError
from prismoe.plan import Plan, make_plan
from prismoe.run import run
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


def test_prompts_in_a_config(tmp_path: Path) -> None:
    """Rows come from the config's prompts; a conversion made again reads the plan instead of making it again."""
    dense, out = tiny_dense(tmp_path / "dense", num_hidden_layers=1), tmp_path / "run"
    settings = {"method": "upcycle", "num_experts": 3, "top_k": 1, "router": "prompts", "prompts": PROMPTS}
    written = tmp_path / "run.yaml"
    written.write_text(yaml.safe_dump({"source": str(dense), "out": str(out), "plan": settings}))
    config = load_config(written)
    dry = run(config, stages=("plan", "convert"), dry_run=True)
    assert [done.state for done in dry.stages] == ["checked", "checked"]
    assert not out.exists()
    run(config, stages=("plan", "convert"))
    plan, model = Plan.load(out / "plan.safetensors"), (out / "moe/model.safetensors").read_bytes()
    states = load_file(out / "prompts.safetensors")["layers.0.inputs"]
    assert states.shape == (3, 64)
    assert plan.layers[0] is not None
    shutil.rmtree(out / "moe")
    (out / "prompts.safetensors").unlink()
    again = run(config, stages=("plan", "convert"))
    assert [done.state for done in again.stages] == ["kept", "made"]
    assert (out / "moe/model.safetensors").read_bytes() == model
    assert not (out / "prompts.safetensors").exists()
    with pytest.raises(UsageError, match=r"plan\.router=auto: auto with prompts; needed router=prompts"):
        run(load_config(written, overrides=["plan.router=auto"], out=str(tmp_path / "b")), stages=("plan",))
    same = load_config(written, overrides=['plan.prompts=[["a"],["b"],["a"]]'], out=str(tmp_path / "c"))
    with pytest.raises(UsageError, match=r"plan\.prompts=.*: experts 0 and 2 have the same prompts"):
        run(same, stages=("plan",))
