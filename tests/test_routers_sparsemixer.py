"""Sampled experts: what is drawn, how it is weighed and what goes back, against float64 NumPy and by its promises."""

import numpy as np
import pytest
import torch

from prismoe.errors import UsageError
from prismoe.train.noise import uniform, uniform_bits
from prismoe.train.routers import arguments_of, attach_policy
from prismoe.train.routers.sparsemixer2 import draw
from prismoe.train.routing import watch
from tests.policies import EXPERTS, HIDDEN, RULES, moment, reference_weights, stock

TOKENS = 40


def hidden(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_uniform(seed, step, layer, numbers, columns):
    bits = uniform_bits(seed, step, layer, numbers, columns).numpy().astype(np.uint64) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) / 2**52


def reference(logits, numbers, top_k, jitter):
    """For each token its draws: experts, π of each draw over all experts, and the factor."""
    tokens, experts = logits.shape
    chosen, policies, factors = [], np.zeros((tokens, top_k, experts)), np.zeros((tokens, top_k))
    for t in range(tokens):
        left, taken = list(range(experts)), []
        for k in range(top_k):
            z = logits[t]
            best = max(left, key=lambda e: (z[e], -e))
            near = [e for e in left if z[best] - z[e] <= 2 * jitter * max(abs(z[e]), z[best])]
            powers = np.exp(z[near] - z[best])
            policies[t, k, near] = powers / powers.sum()
            keys = {e: z[e] - np.log(-np.log(numbers[t, k, e])) for e in near}
            drawn = max(keys, key=keys.get)
            factors[t, k] = 1 if drawn == best or numbers[t, k, experts] > 0.75 else 1 / 3
            left.remove(drawn)
            taken.append(drawn)
        chosen.append(taken)
    return np.array(chosen), policies, factors


@pytest.mark.parametrize("jitter", [0.01, 0.2, 5.0])
@pytest.mark.parametrize("model_type", sorted(RULES))
def test_draws_weights_and_gradients(model_type, jitter):
    """By hand: weight k of a token has the derivative w_k (δ - π_k) by the logits, and the value w_k · factor."""
    now = moment(TOKENS, first=80)
    with watch(stock(model_type).double()) as routers:
        policy = attach_policy("sparsemixer2", routers, arguments={"jitter": jitter})
        policy.begin(now)
        explored = candidates = 0
        for layer, router in enumerate(routers):
            rows = next(parameter for parameter in router.module.parameters() if parameter.shape[-1] == HIDDEN)
            logits, weights, chosen = router.module(hidden())
            logits = logits.detach().double().numpy()
            columns = EXPERTS + 2 * (EXPERTS + 1)
            numbers = reference_uniform(7, 3, layer, now.token_numbers_T, columns)[:, EXPERTS:]
            numbers = numbers.reshape(TOKENS, 2, EXPERTS + 1)
            expected, policies, factors = reference(logits, numbers, 2, jitter)
            assert (chosen.numpy() == expected).all()
            plain = reference_weights(logits, expected, RULES[model_type])
            assert weights.detach().double().numpy() == pytest.approx(plain * factors, abs=1e-6)
            slopes = np.random.default_rng(layer).standard_normal((TOKENS, 2))  # ∂loss/∂weight
            (weights * torch.from_numpy(slopes)).sum().backward()
            steps = np.zeros((TOKENS, EXPERTS))
            for t, k in np.ndindex(TOKENS, 2):
                steps[t] += slopes[t, k] * plain[t, k] * (np.eye(EXPERTS)[expected[t, k]] - policies[t, k])
            assert rows.grad.double().numpy() == pytest.approx(steps.T @ hidden().numpy(), rel=1e-4, abs=1e-5)
            explored += sum(policies[t, k].argmax() != expected[t, k] for t, k in np.ndindex(TOKENS, 2))
            candidates += (policies > 0).sum()
        assert policy.loss() == 0.0
        draws = 2 * 2 * TOKENS
        assert policy.metrics() == pytest.approx({"explored": explored / draws, "candidates": candidates / draws})
        if jitter == 5.0:
            assert candidates == 2 * TOKENS * (EXPERTS + EXPERTS - 1)
            assert explored > 0.3 * draws


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_a_token_gets_different_experts_and_the_stock_ones_where_nothing_else_is_near(top_k):
    logits_TE = torch.randn(200, 4, generator=torch.Generator().manual_seed(2))
    numbers = uniform(0, 0, 0, torch.arange(200), top_k * 4).view(200, top_k, 4)
    drawn = draw(logits_TE, numbers, jitter=10.0)
    assert all(len(set(row)) == top_k for row in drawn.chosen_TK.tolist())
    assert (drawn.candidates_TK == 4 - torch.arange(top_k)).all()
    likely = draw(logits_TE, numbers, jitter=0.0)
    assert torch.equal(likely.chosen_TK, logits_TE.topk(top_k).indices)
    assert likely.greatest_TK.all()
    assert (likely.log_TK == 0).all()


def test_experts_are_drawn_as_often_as_the_softmax_says():
    """Of 40,000 draws a share is off by more than 4.5 standard deviations in one of 150,000 cases."""
    count = 40_000
    logits_TE = torch.tensor([[1.0, 0.5, -0.2, 0.97]]).expand(count, 4)
    numbers = uniform(3, 1, 4, torch.arange(count), 4).view(count, 1, 4)
    for jitter, near in ((2.0, [0, 1, 2, 3]), (0.25, [0, 1, 3]), (0.02, [0, 3])):
        shares = torch.softmax(logits_TE[0, near].double(), dim=0).numpy()
        found = np.bincount(draw(logits_TE, numbers, jitter=jitter).chosen_TK[:, 0], minlength=4) / count
        assert found[near] == pytest.approx(shares, abs=4.5 / 2 / count**0.5)
        assert found.sum() == pytest.approx(found[near].sum())


def test_the_two_factors_are_a_rule_of_third_order():
    """f(w) - f(0) of a cubic f, from its slopes at w and w/3 with shares 1/4 and 3/4: exact, experts being equal."""
    count = 4000
    with watch(stock("qwen2_moe", top_k=1).double()) as routers:
        policy = attach_policy("sparsemixer2", routers, arguments={"jitter": 5.0})
        policy.begin(moment(count))
        logits, weights, chosen = routers[0].module(hidden(1).expand(count, HIDDEN))
        slopes = 3 * weights**2 - 4 * weights + 5  # of f(w) = w³ - 2w² + 5w
        plain = torch.softmax(logits[0].detach().double(), dim=0)
        value = plain**3 - 2 * plain**2 + 5 * plain
        best, seen = int(plain.argmax()), 0
        for expert in range(EXPERTS):
            here = chosen[:, 0] == expert
            found = weights[here].detach().double()
            estimates = (slopes[here] * plain[expert]).detach().double()
            whole = torch.isclose(found, plain[expert].expand_as(found), rtol=1e-5)
            if expert == best or not here.any():
                assert whole.all()
                continue
            assert torch.isclose(found[~whole], plain[expert] / 3, rtol=1e-5).all()
            assert float(whole.double().mean()) == pytest.approx(0.25, abs=4.5 / 2 / int(here.sum()) ** 0.5)
            both = 0.25 * estimates[whole].mean() + 0.75 * estimates[~whole].mean()
            assert float(both) == pytest.approx(float(value[expert]), rel=1e-4)
            seen += 1
        assert seen > 2


def test_one_expert_with_renormalised_weights_learns_here():
    """Its weight is 1 whatever the logits, and the text reaches the router all the same."""
    model = stock(top_k=1)
    with watch(model) as routers:
        policy = attach_policy("sparsemixer2", routers, arguments={"jitter": 1.0})
        policy.begin(moment(17))
        model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits.square().mean().backward()
        assert all(float(router.module.weight.grad.norm()) > 1e-4 for router in routers)
        assert {round(float(weight), 6) for weight in routers[0].weights_TK.detach().flatten()} == {
            1.0,
            round(1 / 3, 6),
        }


def test_a_skipped_step_is_not_counted_and_a_selection_bias_is_refused():
    with watch(stock()) as routers:
        policy = attach_policy("sparsemixer2", routers, arguments=arguments_of("sparsemixer2", {"jitter": 0.3}))
        assert policy.metrics() == {}
        found = []
        for first in (0, 0, TOKENS):  # taken again, then the second micro-batch of the step
            policy.begin(moment(TOKENS, first=first))
            for router in routers:
                router.module(hidden().float())
            policy.loss()
            found.append(policy.metrics()["explored"])
        assert found[0] == found[1] > 0
        assert found[2] != found[0]
    model = stock("glm4_moe")
    model.model.layers[0].mlp.gate.e_score_correction_bias[1] = 0.1
    with watch(model) as routers, pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate: its selection bias is not"):
        attach_policy("sparsemixer2", routers, arguments={"jitter": 0.01})


def test_without_a_choice_there_would_be_no_gradient():
    with pytest.raises(UsageError, match=r"pretrain\.router sparsemixer2: jitter is 0, .*greater than 0"):
        arguments_of("sparsemixer2", {"jitter": 0})
