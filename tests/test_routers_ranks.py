"""Policies on 2 and 4 gloo processes, alone and in the training loop, do what they do on one."""

import multiprocessing
import os
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

from prismoe import registry
from prismoe.errors import InterruptedRun
from prismoe.train.metrics import read_metrics
from prismoe.train.model import load_model
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.routers import Moment, arguments_of, attach_policy
from prismoe.train.routing import watch
from tests.policies import HIDDEN, stock
from tests.tiny import tiny_tokenizer
from tests.training import domain_folder

TOKENS = 48
POLICIES = registry.names("prismoe.train.routers")


class Sum(torch.autograd.Function):
    """What the seam asks of `all_reduce`: the sum over processes, in both directions."""

    @staticmethod
    def forward(context, tensor):
        total = tensor.detach().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context, gradient):
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def outcome(name, rank, world):
    """Loss, metrics, summed gradients of routers and noise, and the state after a step, in one flat list."""
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=generator)
    rows = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    with watch(stock()) as routers:
        arguments = {"drop": "random"} if name == "capacity" else {}
        all_reduce = Sum.apply if world > 1 else lambda tensor: tensor
        policy = attach_policy(name, routers, arguments=arguments_of(name, arguments), all_reduce=all_reduce)
        policy.begin(Moment(0, 0, torch.arange(TOKENS)[rows], 12))
        outputs = [router.module(hidden_TD[rows]) for router in routers]
        loss = policy.loss()
        text = sum((output[1] * torch.arange(1.0, 1.0 + output[1].shape[1])).sum() for output in outputs) / TOKENS
        (text + loss / world).backward()  # as the trainer: each process has its share of the tokens
        parameters = [*(router.module.weight for router in routers), *policy.parameters().values()]
        for parameter in parameters:
            if world > 1:
                distributed.all_reduce(parameter.grad)
        policy.after_step()
        found = [loss.detach().reshape(1), torch.tensor([*policy.metrics().values()])]
        found += [parameter.grad.flatten() for parameter in parameters]
        found += [bias.flatten() for bias in policy.state().values()]
    return torch.cat(found).tolist()


def jobs():
    """Every policy through the training loop, and the two classes that keep a selection bias."""
    everything = ("noisy_topk", "z_loss", "bias_balanced", "warmup", "capacity")
    return {
        "together": ("mixtral", everything, {"warmup": {"router_steps": 1}, "bias_balanced": {"rate": 0.02}}),
        "around": ("mixtral", ("frozen", "balanced", "switch"), {}),
        "parameter": ("ernie4_5_moe", ("switch", "bias_balanced"), {"bias_balanced": {"rate": 0.02}}),
        "dense": ("mixtral", ("dense_mi", "switch", "capacity"), {"dense_mi": {"anneal": (0, 2)}}),
        "sampled": ("mixtral", ("sparsemixer2", "switch"), {"sparsemixer2": {"jitter": 0.3}}),
        "buffer": ("glm4_moe", ("switch", "bias_balanced"), {"bias_balanced": {"rate": 0.02}}),
    }


def train(base, name, out, *, source=None, **more):
    model_type, router, arguments = jobs()[name]
    settings = {"steps": 3, "seq_len": 32, "batch_size": 4, "lr": 1e-2, "max_epochs": 50.0, "threads": 1, **more}
    config = PretrainConfig(warmup_steps=1, eval_tokens=100, router=router, arguments=arguments, **settings)
    return pretrain(base / (source or model_type), config, domains=[base / "text"], out=out)


def work(rank, world, base, pipe):
    torch.set_num_threads(1)
    store = f"file://{base}/store-{world}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    results = {name: outcome(name, rank, world) for name in POLICIES}
    distributed.barrier()
    distributed.destroy_process_group()
    if world == 2:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (base / "port").read_text()}
        for name in jobs():
            with pytest.raises(InterruptedRun):
                train(base, name, base / f"{name}-2", max_steps=2)
            train(base, name, base / f"{name}-2")
    pipe.send(results)
    pipe.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Mixtures in float32, but for a bfloat16 one with a float32 bias, and text."""
    base = tmp_path_factory.mktemp("base")
    for model_type in {model_type for model_type, _, _ in jobs().values()}:
        model = stock(model_type)
        if model_type == "glm4_moe":
            bias = {name: buffer for name, buffer in model.state_dict().items() if "correction_bias" in name}
            model.to(torch.bfloat16)
            model.config.dtype = torch.bfloat16
            for name, buffer in bias.items():
                model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = buffer
        model.save_pretrained(base / model_type)
        tiny_tokenizer(base / model_type, vocab_size=32)
    domain_folder(base / "text", tokenizer=base / "mixtral" / "tokenizer.json", vocab_size=32, documents=20)
    return base


@pytest.fixture(scope="module")
def ranks(base):
    """What 2 and 4 processes found; they are forks, so that they have all that is imported here."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (base / "port").write_text(str(free.getsockname()[1]))
    found = {}
    for world in (2, 4):
        pipes, children = [], []
        for rank in range(world):
            here, there = fork.Pipe(duplex=False)
            child = fork.Process(target=work, args=(rank, world, base, there), daemon=True)
            child.start()
            pipes.append(here)
            children.append(child)
        for here in pipes:
            assert here.poll(240), "a process did not answer"
        found[world] = [here.recv() for here in pipes]
        for child in children:
            child.join(30)
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_ranks_agree_with_one_process(ranks, name):
    expected = outcome(name, 0, 1)
    for found in (*ranks[2], *ranks[4]):
        assert found[name] == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", jobs())
def test_runs_of_two_processes_stopped_and_continued_are_those_of_one(base, ranks, name):
    trained = train(base, name, base / f"{name}-1")
    logs = [read_metrics(base / f"{name}-{world}" / "metrics.jsonl") for world in (1, 2)]
    assert len(logs[0]) == 5  # three steps between two evaluations
    for one, two in zip(*logs, strict=True):
        numbers = [{key: value for key, value in line.items() if isinstance(value, float)} for line in (one, two)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-6)
    models = [load_file(base / f"{name}-{world}" / "model" / "model.safetensors") for world in (1, 2)]
    source = load_file(base / jobs()[name][0] / "model.safetensors")
    for key, tensor in models[0].items():
        assert models[1][key].dtype == tensor.dtype == source[key].dtype, key
        assert torch.allclose(models[1][key], tensor, rtol=1e-2, atol=1e-4), key
        if key.endswith("correction_bias"):
            # It moved by the rate times whole numbers, and nothing of that is rounded away.
            assert tensor.dtype == torch.float32
            assert tensor.any()
            assert torch.equal(models[1][key], tensor)
            assert tensor / 0.02 == pytest.approx((tensor / 0.02).round(), abs=1e-5)
    if name == "together":
        assert trained.router == " + ".join(jobs()[name][1])
        assert 0 < logs[1][2]["capacity.dropped"] < 1
    if name == "dense":
        assert [line["dense_mi.experts_on"] for line in logs[1][1:-1]] == [6.0, 4.0, 2.0]
    if name == "sampled":
        assert 0 < logs[1][2]["sparsemixer2.explored"] < 1


def test_a_bias_trained_from_the_config_alone_is_saved_in_float32(base):
    """The config says bfloat16, the stock class keeps the bias in float32 nevertheless."""
    source = base / "alone"
    source.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / "glm4_moe" / name, source / name)
    trained = train(base, "buffer", base / "alone-1", source="alone", init="random")
    found = load_file(trained.model / "model.safetensors")
    dtypes = {tensor.dtype for name, tensor in found.items() if not name.endswith("correction_bias")}
    biases = {name: tensor for name, tensor in found.items() if name.endswith("correction_bias")}
    assert dtypes == {torch.bfloat16}
    assert len(biases) == 2
    loaded = load_model(trained.model, dtype=torch.bfloat16).state_dict()
    for name, tensor in biases.items():
        assert tensor.dtype == loaded[name].dtype == torch.float32
        assert tensor.any()
        assert torch.equal(loaded[name], tensor)
