"""Compiled layers train like others. The compiler itself takes a minute: PRISMOE_COMPILE=1 asks for it."""

import os

import pytest
import torch

from prismoe.errors import UsageError
from prismoe.train.compiling import compile_layers
from prismoe.train.experts import use_experts
from prismoe.train.model import load_model
from prismoe.train.routers import Moment, arguments_of, attach_policy
from prismoe.train.routing import watch
from tests.tiny import tiny_dense
from tests.training import tiny_moe

INDUCTOR = pytest.param(
    "inductor", marks=pytest.mark.skipif("PRISMOE_COMPILE" not in os.environ, reason="PRISMOE_COMPILE is not set")
)


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing compiled is left for other tests."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def steps(model, policy_name):
    """Losses, router losses and the last gradients of three steps, through hooks, noise and recomputation."""
    found = []
    ids_BT = torch.arange(64).view(2, 32)
    with watch(model) as routers:
        policy = attach_policy(policy_name, routers, arguments=arguments_of(policy_name, {}))
        optimizer = torch.optim.SGD([*model.parameters(), *policy.parameters().values()], lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            policy.begin(Moment(0, step, torch.arange(64), 32))
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
            loss, router_loss = logits_BTV.logsumexp(-1).mean(), policy.loss()
            (loss + router_loss).backward()
            optimizer.step()
            found.append([loss.item(), float(router_loss)])
        policy.detach()
    return found, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")  # torch hides its own in a way that turns none into errors
@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
@pytest.mark.parametrize("kind", ["dense", "mixtral", "granitemoeshared"])
def test_compiled_layers_give_the_same_losses_and_gradients(tmp_path, backend, kind):
    folder = tiny_dense(tmp_path / "dense") if kind == "dense" else tiny_moe(tmp_path / "moe", kind)
    plain, compiled = load_model(folder), load_model(folder)
    for model in (plain, compiled):
        use_experts(model)
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    names = list(compiled.state_dict())
    compile_layers(compiled, device=torch.device("cpu"), backend=backend)
    counters = torch._dynamo.utils.counters
    counters.clear()
    (expected, slopes), (found, got) = steps(plain, "noisy_topk"), steps(compiled, "noisy_topk")
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    for name, slope in slopes.items():
        assert float((got[name] - slope).abs().max()) <= 1e-4 * float(slope.abs().max()) + 1e-9, name
    assert list(compiled.state_dict()) == names
    assert counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert not counters["graph_break"]
    parts = {name.rpartition(".")[2] for name, module in compiled.named_modules() if module._compiled_call_impl}
    assert (parts >= {"self_attn", "input_layernorm"}) == (kind != "dense")
    assert not parts & {"experts", "gate", "router", "mlp", "block_sparse_moe"}


def test_no_compiler_is_told_before_training(tmp_path):
    model = load_model(tiny_dense(tmp_path / "dense"))
    with pytest.raises(UsageError, match=r"pretrain\.compile: true, but a sum cannot be compiled") as caught:
        compile_layers(model, device=torch.device("cpu"), backend="nothing")
    assert "pretrain.compile=false" in str(caught.value)
