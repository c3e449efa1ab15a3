"""The scale taken out of down_proj while a mixture trains: the same bits for powers of two, and back again."""

import dataclasses

import pytest
import torch

from prismoe import convert, make_plan
from prismoe.errors import UsageError
from prismoe.train.model import load_model
from prismoe.train.routing import watch
from prismoe.train.unfold import unfolded, unfolding
from tests.tiny import tiny_dense

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return tiny_dense(tmp_path_factory.mktemp("dense") / "dense")


def mixture(dense, folder, *, num_experts=8, **arguments):
    plan = make_plan(dense, method="random", num_experts=num_experts, top_k=2, scale="paper", **arguments)
    convert(dense, plan, target="mixtral", out=folder)
    return plan, load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_power_of_two_computes_the_same_bits_and_comes_back(tmp_path, dense, dtype):
    plan, model = mixture(dense, tmp_path / "moe")
    model.to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for training in (False, True):
        model.train(training)
        expected = model(input_ids=IDS, use_cache=False).logits
        with watch(model) as routers:
            factors = unfolding(plan, model, routers)
            assert factors == [4.0] * 3
            with unfolded(model, routers, factors):
                for layer in model.model.layers:
                    name = f"model.layers.{layer.self_attn.layer_idx}.mlp.experts.down_proj"
                    assert torch.equal(layer.mlp.experts.down_proj, before[name] / 4)
                assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)


def test_an_update_is_the_papers():
    """One step of plain descent: the gradient by the unfolded matrix is s times that by the folded one."""
    from tests.policies import stock

    gradients = []
    for factor in (1.0, 4.0):
        model = stock()
        with watch(model) as routers, unfolded(model, routers, [factor] * 2):
            model(input_ids=IDS[:, :17] % 32, use_cache=False).logits.square().mean().backward()
            gradients.append(model.model.layers[0].mlp.experts.down_proj.grad)
    assert torch.equal(gradients[1], 4.0 * gradients[0])


def test_what_cannot_be_exact_stays_folded(tmp_path, dense):
    plan, model = mixture(dense, tmp_path / "three", num_experts=3)
    other = dataclasses.replace(
        plan, layers=tuple(dataclasses.replace(layer, scale=4.0, spread="sqrt") for layer in plan.layers)
    )
    with watch(model) as routers:
        for one in (None, plan, other):  # none is known; 3/2 is no power of two; up carries a part
            assert unfolding(one, model, routers) == [1.0] * 3
            with pytest.raises(UsageError, match=r"pretrain\.unfold_scale"):
                unfolding(one, model, routers, True)
        four = dataclasses.replace(plan, layers=tuple(dataclasses.replace(layer, scale=4.0) for layer in plan.layers))
        assert unfolding(four, model, routers, True) == [4.0] * 3
        assert unfolding(four, model, routers, False) == [1.0] * 3
