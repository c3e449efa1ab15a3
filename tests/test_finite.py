"""One weight that is not finite: refused by name before anything is computed with it, also where no text would look."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from prismoe.calibrate.parts import Parts
from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.finite import finite_ffn, require_finite
from prismoe.errors import InputError
from prismoe.plan import make_plan
from tests.tiny import tiny_dense


def damaged(folder, name, value, *, dtype="float32"):
    tiny_dense(folder, dtype=dtype)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_is_found_and_named(tmp_path, dtype, value):
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint = Checkpoint.open(damaged(tmp_path / "dense", name, value, dtype=dtype))
    require_finite(checkpoint, [other for other in checkpoint.tensors if other != name])
    assert finite_ffn(checkpoint, 0).up_FD.shape == (96, 64)
    with pytest.raises(InputError, match=rf"model\.safetensors: {name}: holds NaN or infinity"):
        finite_ffn(checkpoint, 1)


def test_a_plan_that_reads_weights_names_the_tensor(tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    folder = damaged(tmp_path / "dense", name, float("inf"))
    with pytest.raises(InputError, match=name):
        make_plan(folder, method="clustering", num_experts=4, top_k=2)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_calibration_names_the_tensor_though_no_text_uses_the_token(tmp_path, name):
    checkpoint = Checkpoint.open(damaged(tmp_path / "dense", name, float("nan")))
    with pytest.raises(InputError, match=name):
        Parts(checkpoint, dtype=torch.float32, device=torch.device("cpu")).layers(0, 1)
