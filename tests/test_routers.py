"""Router policies: the balance loss against its formula, and that a policy leaves no trace in what is saved."""

import json

import numpy as np
import pytest
import torch

from prismoe.errors import NumericalError, UsageError
from prismoe.train.model import load_model
from prismoe.train.routers import arguments_of, attach_policy
from prismoe.train.routers.switch import balance
from prismoe.train.routing import GradientGuard, LoadMeter, watch
from tests.training import tiny_moe


def test_balance_is_the_formula_of_the_paper():
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(50, 8))
    chosen = np.argsort(-logits, axis=1)[:, :2]
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    share = np.array([(chosen == e).sum() for e in range(8)]) / chosen.size
    expected = 8 * float(share @ probability.mean(axis=0))
    assert float(balance(torch.tensor(logits), torch.tensor(chosen))) == pytest.approx(expected, rel=1e-6)


def test_balance_is_one_when_balanced_and_the_number_of_experts_when_collapsed():
    chosen = torch.arange(8).repeat(4).view(-1, 1)
    assert float(balance(torch.zeros(32, 8), chosen)) == pytest.approx(1.0)
    collapsed = torch.full((32, 8), -100.0)
    collapsed[:, 3] = 100.0
    assert float(balance(collapsed, torch.full((32, 1), 3))) == pytest.approx(8.0)


def test_balance_pushes_the_busy_expert_down():
    logits = torch.zeros(32, 4, requires_grad=True)
    chosen = torch.cat([torch.zeros(20, dtype=torch.long), torch.arange(12) % 4]).view(-1, 1)
    balance(logits, chosen).backward()
    gradient_E = logits.grad.sum(dim=0)
    assert gradient_E[0] > 0  # descending lowers expert 0 …
    assert (gradient_E[1:] < 0).all()  # … and raises the others


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoeshared"])
def test_every_target_is_watched(tmp_path, model_type):
    model = load_model(tiny_moe(tmp_path / model_type, model_type))
    ids = torch.arange(3, 43).view(1, -1)
    with watch(model) as routers:
        output = model(input_ids=ids, output_router_logits=True, use_cache=False)
        assert [(router.num_experts, router.top_k) for router in routers] == [(4, 2)] * 2
        for router, expected in zip(routers, output.router_logits, strict=True):
            assert torch.equal(router.logits_TE, expected)
            assert torch.equal(router.chosen_TK.sort().values, expected.topk(2).indices.sort().values)
        meter = LoadMeter(routers)
        meter.add()
        policy = attach_policy("switch", routers, arguments={"coefficient": 0.5})
        # The library pools layers; ours sums them. Per layer its balance term is K times ours (its f sums to K).
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        stock = sum(load_balancing_loss_func((logits.detach(),), 4, 2) for logits in output.router_logits) / 2
        assert policy.loss().item() == pytest.approx(0.5 * stock.item(), rel=1e-5)
    result = meter.result()
    for layer, logits in enumerate(output.router_logits):
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=4)
        assert result["load"][layer] == pytest.approx((counts / 80).tolist(), abs=1e-5)
        assert result["max_over_mean"][layer] == pytest.approx(float(counts.max()) / 20, abs=1e-4)
        entropy = torch.distributions.Categorical(logits=logits.detach()).entropy().mean() / np.log(4)
        assert result["entropy"][layer] == pytest.approx(float(entropy), abs=1e-5)
    ours = [hook for module in model.modules() for hook in module._forward_hooks.values() if "Router.keep" in str(hook)]
    assert not ours


def test_a_mixture_without_declared_routers_is_refused(tmp_path):
    model = load_model(tiny_moe(tmp_path / "moe"))
    model._can_record_outputs = {}
    with pytest.raises(UsageError, match="mixtral: a mixture whose routers are not declared"), watch(model):
        pass


def test_gradient_guard(tmp_path):
    model = load_model(tiny_moe(tmp_path / "moe"))
    with watch(model) as routers:
        model(input_ids=torch.arange(3, 43).view(1, -1), use_cache=False).logits.square().mean().backward()
        guard = GradientGuard(routers)
        norms = guard.norms()
        assert norms == pytest.approx([float(router.module.weight.grad.double().norm()) for router in routers])
    for step in range(1, 5):
        guard.check([norms[0], 0.0 if step % 3 else 1.0], whole=1.0, step=step)  # two silent steps, then a loud one
    guard.check([1.0, 1e-9], whole=1.0, step=5)
    with pytest.raises(NumericalError, match=r"layers\.1\.mlp\.gate, step 6: the router's gradient is zero \(1e-09 of"):
        guard.check([1.0, 1e-9], whole=1.0, step=6)


def test_arguments_are_checked_against_the_signature():
    assert arguments_of("switch", {}) == {"coefficient": 0.01}
    assert arguments_of("switch", {"coefficient": 1}) == {"coefficient": 1.0}
    for arguments, message in [
        ({"coeficient": 0.1}, "unknown argument coeficient; did you mean coefficient?"),
        ({"coefficient": "0.1"}, "coefficient is '0.1'"),
        ({"coefficient": -1.0}, "greater than or equal to 0"),
    ]:
        with pytest.raises(UsageError, match=r"pretrain\.router") as caught:
            arguments_of("switch", arguments)
        assert message in str(caught.value)
        assert caught.value.exit_code == 2
    assert arguments_of("bias_balanced", {"fade": [10, 20]})["fade"] == (10, 20)  # as a config file has it
    with pytest.raises(UsageError, match=r"fade is \[10\]"):
        arguments_of("bias_balanced", {"fade": [10]})
    with pytest.raises(UsageError, match=r"unknown 'swich'.*did you mean switch"):
        arguments_of("swich", {})


def test_policies_load_no_torch_for_their_schema():
    import subprocess
    import sys

    code = (
        "import sys, json; from prismoe.train.routers import arguments_of;"
        "print(json.dumps([arguments_of('switch', {}), 'torch' in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(found) == [{"coefficient": 0.01}, False]
