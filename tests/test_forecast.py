"""What a dry run says of 8 and 512 processes, against shapes that PyTorch itself places on fake process groups."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prismoe.errors import UsageError
from prismoe.train.engine.layout import Layout
from prismoe.train.forecast import forecast
from prismoe.train.launch import launch_lines
from prismoe.train.model import empty_model
from prismoe.train.settings import PretrainConfig
from prismoe.train.speed import flops_per_token, peak_flops

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 512,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": False,
}
LAYOUTS = [(8, 1, 1), (8, 2, 1), (8, 1, 4), (512, 1, 1), (512, 64, 1), (512, 64, 8), (512, 16, 1), (512, 16, 16)]
PLACED = """
import json, sys
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from prismoe.train.engine import Engine
from prismoe.train.engine.layout import Layout
from prismoe.train.engine.placement import place
from prismoe.train.model import empty_model
from prismoe.train.weights import held
config, layouts = json.loads(sys.argv[1])
found = []
for world, replicate, experts in layouts:
    distributed.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    engine = Engine(Layout(world, replicate, experts), rank=0, device=torch.device("cpu"))
    model = place(empty_model(config, where="test"), engine)
    parameters = dict(model.named_parameters())
    found.append({
        "held": sum(held(p)[0].numel() for p in parameters.values()),
        "meshes": sorted({str(tuple(p.device_mesh.shape)) for p in parameters.values()}),
        "experts": list(held(parameters["model.layers.0.mlp.experts.gate_up_proj"])[0].shape),
    })
    distributed.destroy_process_group()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def placed():
    arguments = [sys.executable, "-c", PLACED, json.dumps([MIXTRAL, LAYOUTS])]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(LAYOUTS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("shape", LAYOUTS)
def test_memory_is_that_of_what_pytorch_places(placed, shape):
    layout = Layout(*shape)
    config = PretrainConfig(batch_size=1024, seq_len=128, processes=layout.world)
    found = forecast(MIXTRAL, config, layout, where="test", command="pretrain x.yaml")
    assert found.weight_bytes == 4 * placed[shape]["held"]
    assert found.optimizer_bytes == 8 * placed[shape]["held"]
    assert found.saving_bytes == 24 * placed[shape]["held"]  # a copy of weights and moments, and what is written of it
    # 16 experts of 96 rows: whole ones where they divide, else (32 processes of a copy) some rows of each.
    experts = {1: [1, 96, 64], 4: [4, 96, 64], 8: [2, 96, 64], 32: [16, 3, 64], 512: [1, 96, 64]}
    if shape[2] == 1:
        assert placed[shape]["experts"] == experts[layout.shard]
    if shape == (512, 16, 16):
        assert placed[shape]["experts"] == [1, 48, 64]


def test_what_travels():
    model = empty_model(MIXTRAL, where="test")
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for p in model.parameters() if p.ndim == 3)
    config = PretrainConfig(batch_size=64, seq_len=128, micro_batch_size=4)

    def sent(*shape):
        return forecast(MIXTRAL, config, Layout(*shape), where="test", command="").sent_bytes

    # 8 processes: 2 micro-batches of 4 rows; everything is gathered twice and scattered once in each.
    assert sent(8) == {
        "all_gather": 2 * 2 * (total * 7 // 8) * 4,
        "reduce_scatter": 2 * (total * 7 // 8) * 4,
        "all_reduce": 0,
        "all_to_all": 0,
    }
    assert sent(8, 8)["all_gather"] == 0
    assert sent(8, 8)["all_reduce"] == 2 * (2 * total * 7 // 8) * 4
    apart = sent(8, 1, 8)
    assert apart["all_gather"] == 2 * 2 * ((total - experts) * 7 // 8) * 4
    assert apart["all_to_all"] == 4 * 2 * (4 * 128) * 4 * 64 * 3 * 7 // 8 * 4


def test_flops_of_a_token_are_of_active_weights_and_causal_attention():
    model = empty_model(MIXTRAL, where="test")
    attention = 64 * 64 * 2 + 2 * 64 * 32
    experts = 4 * 3 * 64 * 48
    expected = 6 * (3 * (attention + 16 * 64 + experts) + 1000 * 64) + 6 * 3 * 64 * 128
    assert flops_per_token(model, seq_len=128) == expected
    tied = empty_model({**MIXTRAL, "tie_word_embeddings": True}, where="test")
    assert flops_per_token(tied, seq_len=128) == expected
    assert (peak_flops("NVIDIA H200"), peak_flops("NVIDIA H20"), peak_flops("abacus")) == (989e12, 148e12, None)


@pytest.mark.parametrize(
    ("shape", "batch", "micro", "experts", "message"),
    [
        ((8, 3, 1), 64, 0, 16, "pretrain.replicate: 3 copies on 8 processes; needed a divisor of their number"),
        ((8, 2, 8), 64, 0, 16, "pretrain.expert_parallel: experts over 8 of the 4 processes of a copy"),
        ((8, 1, 8), 64, 0, 12, "pretrain.expert_parallel: 12 experts over 8 processes; needed 1 or a divisor"),
        ((8, 1, 2), 64, 0, 0, "pretrain.expert_parallel: a dense model; needed 1"),
        ((8, 1, 1), 60, 0, 16, "pretrain.batch_size: 60 sequences on 8 processes; needed a multiple of 8"),
        ((8, 1, 1), 64, 3, 16, "pretrain.micro_batch_size: 3 at a time of the 8 sequences of a process"),
    ],
)
def test_impossible_layouts(shape, batch, micro, experts, message):
    with pytest.raises(UsageError) as caught:
        Layout(*shape).check(batch_size=batch, micro_batch_size=micro, num_experts=experts)
    assert str(caught.value).startswith(message)


def test_launch_lines():
    one, many = (launch_lines(Layout(world), command="pretrain run.yaml") for world in (4, 512))
    assert one["torchrun"].startswith("torchrun --standalone --nproc-per-node 4 ")
    assert one["torchrun"].endswith(" -m prismoe pretrain run.yaml")
    assert "--nnodes 64 --nproc-per-node 8 " in many["torchrun"]
    assert "--nodes=64 " in many["slurm"]
    import yaml

    service, job = yaml.safe_load_all(many["kubernetes"])
    assert (service["kind"], service["metadata"]["name"]) == ("Service", job["spec"]["template"]["spec"]["subdomain"])
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert job["spec"]["completions"] == 64
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["command"][2].endswith("-m prismoe pretrain run.yaml")
    quoted = launch_lines(Layout(16), command="pretrain 'my run.yaml' 'data.weights={a: \"1\"}'")["kubernetes"]
    (container,) = list(yaml.safe_load_all(quoted))[1]["spec"]["template"]["spec"]["containers"]
    assert container["command"][2].endswith("-m prismoe pretrain 'my run.yaml' 'data.weights={a: \"1\"}'")
