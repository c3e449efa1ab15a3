"""What benchmarks/gpu.py counts, on a CPU; measuring needs a device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks.gpu import SHAPES, Shape, backends, balanced, config_of, experts_of, layer_bytes, layer_flops, mfu
from prismoe.train.experts import sorted_experts
from prismoe.train.speed import flops_per_token

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"


def test_flops_of_a_layer_are_those_that_torch_counts() -> None:
    shape = Shape(hidden=64, width=24, experts=4, top_k=2, goal=0.0)
    module = experts_of(shape, device="cpu").float()
    x_TD = torch.randn(32, 64, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        out_TD = sorted_experts(module, x_TD, balanced(32, 4, 2), torch.rand(32, 2))
    assert forward.get_total_flops() == layer_flops(shape, tokens=32, backward=False)
    with FlopCounterMode(display=False) as backward:
        out_TD.sum().backward()
    assert forward.get_total_flops() + backward.get_total_flops() == layer_flops(shape, tokens=32)
    assert layer_bytes(shape) == sum(2 * parameter.numel() for parameter in module.parameters())


def test_the_shapes_are_those_of_the_papers() -> None:
    # 10^12 FLOPs forward and backward of 16384 tokens, by hand: 18 T K W D.
    assert {name: layer_flops(shape) / 1e12 for name, shape in SHAPES.items()} == pytest.approx(
        {"LLaMA-MoE 2/16": 1.662, "LLaMA-MoE 4/16": 3.324, "LLaMA-MoE 2/8": 3.324, "Llama-3 8x8B top-2": 34.63},
        rel=1e-3,
    )
    assert all(shape.experts * shape.width == 11008 for name, shape in SHAPES.items() if "LLaMA-MoE" in name)


def test_balanced_choices_load_all_experts_equally_and_never_one_twice() -> None:
    for experts, top_k in ((16, 4), (16, 2), (8, 2)):
        index_TK = balanced(64, experts, top_k)
        assert torch.bincount(index_TK.flatten(), minlength=experts).tolist() == [64 * top_k // experts] * experts
        assert all(len(set(row)) == top_k for row in index_TK.tolist())


def test_models_have_the_parameters_and_flops_of_the_papers() -> None:
    flops, sizes = {}, {}
    for model in ("dense", "4/16", "2/16"):
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(config_of(model))
        flops[model] = flops_per_token(made, seq_len=4096)
        sizes[model] = sum(parameter.numel() for parameter in made.parameters())
    assert sizes["dense"] == 6_738_415_616
    assert sizes["4/16"] == 6_738_415_616 + 32 * 16 * 4096
    assert flops["4/16"] / 1e9 == pytest.approx(23.4, abs=0.05)
    assert flops["2/16"] / 1e9 == pytest.approx(20.4, abs=0.3)
    assert mfu(17_700, flops["4/16"], 989e12) == pytest.approx(0.42, abs=0.002)


def test_backends_that_are_missing_are_none() -> None:
    found = backends()
    assert list(found) == ["sorted", "grouped_mm", "sonicmoe", "deepgemm", "liger", "transformer_engine"]
    assert found["sorted"] is sorted_experts
    assert found["grouped_mm"] is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_ends() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.strip() == "no CUDA device: nothing measured"
    assert done.stdout == ""
