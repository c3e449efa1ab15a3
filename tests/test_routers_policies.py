"""Every router policy against an independent float64 reference, on the routers of stock classes."""

import math

import numpy as np
import pytest
import torch

from prismoe.errors import UsageError
from prismoe.train.noise import normal, uniform_bits
from prismoe.train.routers import arguments_of, attach_policy
from prismoe.train.routers.noisy_topk import balance_terms, load_probabilities
from prismoe.train.routing import watch
from prismoe.train.weighting import weighting
from tests.policies import (
    EXPERTS,
    HIDDEN,
    RULES,
    moment,
    reference_scores,
    reference_weights,
    stock,
    top,
)

TOKENS = 40


def hidden(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def clean_logits(router, hidden_TD):
    weight = next(parameter for parameter in router.module.parameters() if parameter.shape[-1] == HIDDEN)
    return hidden_TD.double().numpy() @ weight.detach().double().numpy().T


def forward(routers, hidden_TD):
    """All routers of a model see the same tokens."""
    return [router.module(hidden_TD) for router in routers]


def variation(sums):
    return sums.var(ddof=1) / (sums.mean() ** 2 + 1e-10)


def test_the_paper_repositorys_example():
    """Worked by hand: three tokens, K = 2, no noise: CV² .46452 and .14815, loss .006127 at weight 1e-2."""
    logits = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [4, 1, 3, 2]], float)
    chosen = top(logits, 2)
    importance = np.zeros(4)
    np.add.at(importance, chosen.ravel(), reference_weights(logits, chosen, RULES["mixtral"]).ravel())
    terms = balance_terms(torch.tensor(np.stack([importance, [2.0, 1.0, 2.0, 1.0]])))
    assert terms.tolist() == pytest.approx([0.46452, 0.14815], abs=1e-5)
    assert 0.01 * float(terms.sum()) == pytest.approx(0.006127, abs=1e-6)


def reference_load(clean, noise, sigma, top_k, *, compat):
    load = np.zeros(clean.shape)
    noisy = clean + noise
    for t, e in np.ndindex(*clean.shape):
        descending = sorted(noisy[t], reverse=True)
        tested = noise[t, e] if compat else noisy[t, e]
        threshold = descending[top_k] if tested > descending[top_k] else descending[top_k - 1]
        load[t, e] = 0.5 * (1 + math.erf((clean[t, e] - threshold) / sigma[t, e] / math.sqrt(2)))
    return load


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("model_type", sorted(RULES))
def test_noisy_topk(model_type, compat):
    rule = RULES[model_type]
    hidden_TD, now = hidden(), moment(TOKENS, first=80)
    with watch(stock(model_type)) as routers:
        policy = attach_policy("noisy_topk", routers, arguments={"coefficient": 0.05, "compat": compat})
        parameters = policy.parameters()
        assert all(not parameter.any() for parameter in parameters.values())  # where training starts
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
        policy.begin(now)
        outputs = forward(routers, hidden_TD)
        expected = [0.0, 0.0]
        for layer, (router, output, weight) in enumerate(zip(routers, outputs, parameters.values(), strict=True)):
            clean = clean_logits(router, hidden_TD)
            sigma = np.log1p(np.exp(hidden_TD.double().numpy() @ weight.detach().double().numpy().T)) + 0.01
            noise = normal(7, 3, layer, now.token_numbers_T, EXPERTS).double().numpy() * sigma
            chosen = top(clean + noise, 2)
            weights = reference_weights(clean + noise, chosen, rule)
            assert (output[2].numpy() == chosen).all()
            assert output[1].detach().numpy() == pytest.approx(weights, abs=2e-6)
            assert (router.chosen_TK == output[2]).all()
            importance = np.zeros(EXPERTS)
            np.add.at(importance, chosen.ravel(), weights.ravel())
            expected[0] += variation(importance)
            expected[1] += variation(reference_load(clean, noise, sigma, 2, compat=compat).sum(axis=0))
        assert float(policy.loss().detach()) == pytest.approx(0.05 * sum(expected), rel=2e-5)
        assert policy.metrics() == pytest.approx({"importance_cv2": expected[0], "load_cv2": expected[1]}, rel=2e-5)


def test_the_load_estimate_is_a_probability_and_the_published_one_is_of_other_experts():
    """By hand: a confident router on three tokens chooses [2, 1, 2, 1] experts; noise alone is seldom above them."""
    logits = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [4, 1, 3, 2]], dtype=torch.float64) * 3
    noise = normal(0, 0, 0, torch.arange(3), 4).double() * 0.7031
    sigma = torch.full_like(logits, 0.7031)
    ours = load_probabilities(logits, noise, sigma, top_k=2).sum(dim=0)
    published = load_probabilities(logits, noise, sigma, top_k=2, compat=True).sum(dim=0)
    assert ours.tolist() == pytest.approx([2, 1, 2, 1], abs=0.2)
    assert float((published - torch.tensor([2.0, 1, 2, 1])).abs().max()) > 0.4


def test_noise_that_starts_at_zero_weights_has_the_published_size():
    """σ₀ = ln 2 + 0.01 = 0.70315: recovered from the noisy logits that leave the router."""
    with watch(stock()) as routers:
        policy = attach_policy("noisy_topk", routers, arguments=arguments_of("noisy_topk", {}))
        policy.begin(moment(TOKENS))
        noisy = routers[0].module(hidden())[0].detach().double().numpy()
    noise = normal(7, 3, 0, torch.arange(TOKENS), EXPERTS).double().numpy()
    assert (noisy - clean_logits(routers[0], hidden())) / noise == pytest.approx(0.70315, abs=1e-3)


@pytest.mark.parametrize("name", ["switch", "z_loss", "noisy_topk"])
def test_gradients(name):
    """Analytic against numeric derivatives in float64 by router and noise weights and by the hidden states."""
    model = stock("qwen3_moe", num_experts=4).double()  # its weights keep the dtype of the hidden states
    with watch(model) as routers:
        policy = attach_policy(
            name, routers, arguments={"coefficient": 0.7, **({"compat": False} if name[0] == "n" else {})}
        )
        for parameter in policy.parameters().values():
            parameter.data = 0.2 * torch.randn(parameter.shape, dtype=torch.float64)
        inputs = [hidden(6).double().requires_grad_(), *(router.module.weight for router in routers)]

        def loss(hidden_TD, *others):
            policy.begin(moment(6))
            weights = [output[1] for output in forward(routers, hidden_TD)]
            return policy.loss(), *(weights if name == "noisy_topk" else [])

        assert torch.autograd.gradcheck(loss, (*inputs, *policy.parameters().values()))


@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe"])
def test_z_loss(model_type):
    with watch(stock(model_type)) as routers:
        policy = attach_policy("z_loss", routers, arguments={"coefficient": 0.3})
        policy.begin(moment(TOKENS))
        forward(routers, hidden())
        expected = sum(
            float((np.log(np.exp(clean_logits(router, hidden())).sum(axis=1)) ** 2).mean()) for router in routers
        )
        assert float(policy.loss().detach()) == pytest.approx(0.3 * expected, rel=1e-5)


def test_large_logits_push_no_infinity_into_the_z_loss():
    with watch(stock()) as routers:
        policy = attach_policy("z_loss", routers, arguments={"coefficient": 1.0})
        forward(routers, 1e4 * hidden())
        assert math.isfinite(float(policy.loss().detach()))


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "ernie4_5_moe", "glm4_moe"])
def test_bias_balanced(model_type):
    """Three steps of two micro-batches; a class with a slot for the bias holds it, any other is rerouted."""
    rule, rate, batches = RULES[model_type], 0.03, [hidden(seed=1), hidden(seed=2)]
    model = stock(model_type)
    with watch(model) as routers:
        policy = attach_policy("bias_balanced", routers, arguments={"rate": rate, "fade": None})
        biases = [np.zeros(EXPERTS) for _ in routers]
        for step in range(3):
            loads = [np.zeros(EXPERTS) for _ in routers]
            for number, batch in enumerate(batches):
                policy.begin(moment(TOKENS, step=step, first=number * TOKENS))
                outputs = forward(routers, batch)
                assert float(policy.loss().detach()) == 0.0
                for layer, (router, output) in enumerate(zip(routers, outputs, strict=True)):
                    logits = clean_logits(router, batch)
                    chosen = top(reference_scores(logits, rule) + biases[layer], 2)
                    assert (output[2].sort().values.numpy() == np.sort(chosen)).all()
                    weights = reference_weights(logits, output[2].numpy(), rule)
                    assert output[1].detach().numpy() == pytest.approx(weights, abs=2e-6)
                    loads[layer] += np.bincount(chosen.ravel(), minlength=EXPERTS)
            policy.after_step()
            biases = [bias + rate * np.sign(load.mean() - load) for bias, load in zip(biases, loads, strict=True)]
        in_model = [weighting(router).bias_E for router in routers]
        state = list(policy.state().values())
        assert len(state) == (0 if in_model[0] is not None else 2)
        for bias, found in zip(biases, state or in_model, strict=True):
            assert np.abs(bias).max() > 0
            assert found.detach().reshape(-1).numpy() == pytest.approx(bias, abs=1e-6)
        if state:  # what the saved model will choose otherwise, in both micro-batches of a step
            moved = 0
            for number, batch in enumerate(batches):
                policy.begin(moment(TOKENS, step=3, first=number * TOKENS))
                forward(routers, batch)
                policy.loss()
                for router in routers:
                    bare = top(clean_logits(router, batch), 2).tolist()
                    pairs = zip(router.chosen_TK.tolist(), bare, strict=True)
                    moved += sum(len(set(now) - set(before)) for now, before in pairs)
            assert moved > 0
            assert policy.metrics()["moved"] == pytest.approx(moved / (2 * 2 * TOKENS * 2))


def test_the_bias_fades():
    with watch(stock()) as routers:
        policy = attach_policy("bias_balanced", routers, arguments={"rate": 1e-3, "fade": (10, 20)})
        for bias in policy.state().values():
            bias[0] = 0.2
        shares = []
        for step in (5, 10, 15, 20, 30):
            policy.begin(moment(TOKENS, step=step))
            forward(routers, hidden())
            policy.loss()
            scores = reference_scores(clean_logits(routers[0], hidden()), RULES["mixtral"])
            scores[:, 0] += 0.2 * {5: 1, 10: 1, 15: 0.5, 20: 0, 30: 0}[step]
            assert (routers[0].chosen_TK.sort().values.numpy() == np.sort(top(scores, 2))).all()
            shares.append(policy.metrics()["moved"])
    assert shares[0] == shares[1] > shares[2] > shares[3] == shares[4] == 0.0
    with watch(stock("glm4_moe")) as routers, pytest.raises(UsageError, match="this model keeps the bias"):
        attach_policy("bias_balanced", routers, arguments={"rate": 1e-3, "fade": (10, 20)})


def reference_kept(chosen, capacity, group, priority):
    kept = np.zeros(chosen.shape, bool)
    for first in range(0, len(chosen), group):
        for expert in range(EXPERTS):
            rows = [(t, k) for t in range(first, first + group) for k in range(2) if chosen[t, k] == expert]
            for place in sorted(rows, key=lambda place: priority(*place))[:capacity]:
                kept[place] = True
    return kept


@pytest.mark.parametrize("drop", ["position", "random"])
@pytest.mark.parametrize("group", [0, 10])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 4.0])
def test_capacity(factor, group, drop):
    now, bare = moment(TOKENS, first=40), stock()
    with watch(bare) as routers:
        expected_chosen = [output[2].numpy() for output in forward(routers, hidden())]
        policy = attach_policy("capacity", routers, arguments={"factor": factor, "drop": drop, "group_tokens": group})
        policy.begin(moment(TOKENS, first=0, step=now.step))  # a step that is left out and taken again counts once
        forward(routers, hidden())
        policy.loss()
        policy.begin(moment(TOKENS, first=0, step=now.step))
        forward(routers, hidden(seed=1))
        policy.loss()
        before = policy.metrics()["dropped"]
        policy.begin(now)
        outputs = forward(routers, hidden())
        assert policy.loss() == 0.0
        lost = 0
        for layer, (router, output) in enumerate(zip(routers, outputs, strict=True)):
            bits = uniform_bits(7, 3, layer, now.token_numbers_T, EXPERTS).numpy()
            chosen = expected_chosen[layer]
            kept = reference_kept(
                chosen,
                math.ceil(factor * (group or TOKENS) * 2 / EXPERTS),
                group or TOKENS,
                (lambda t, k: t) if drop == "position" else (lambda t, k: bits[t, chosen[t, k]]),  # noqa: B023
            )
            weights = reference_weights(clean_logits(router, hidden()), chosen, RULES["mixtral"])
            assert output[1].detach().numpy() == pytest.approx(weights * kept, abs=1e-6)
            lost += (~kept).sum()
        now_dropped = lost / (2 * TOKENS * 2)
        assert policy.metrics()["dropped"] == pytest.approx((before + now_dropped) / 2)  # of both micro-batches
        assert lost > 0 if factor <= 1.0 else lost <= 1
        if group:
            policy.begin(moment(TOKENS // 2, first=40))  # half of the tokens drop what they dropped before
            half = forward(routers, hidden()[: TOKENS // 2])
            assert all(torch.equal(a[1], b[1][: TOKENS // 2]) for a, b in zip(half, outputs, strict=True))
            with pytest.raises(UsageError, match="groups of 10 tokens do not fill a micro-batch of 35"):
                policy.begin(moment(35))


def test_a_dropped_token_goes_through_the_residual_connection():
    """Nothing fits: the block adds zero, whatever the experts compute."""
    model = stock()
    block = model.model.layers[0].mlp
    with watch(model) as routers:
        policy = attach_policy("capacity", routers, arguments={"factor": 1e-9, "drop": "position", "group_tokens": 1})
        policy.begin(moment(TOKENS))
        output = block(hidden()[None])
        policy.loss()
        assert output.abs().max() > 0  # one assignment is always held: ⌈1e-9⌉ = 1
        assert policy.metrics()["dropped"] == 0.0
        kept = routers[0].weights_TK.detach().clone()
        policy = attach_policy("capacity", routers, arguments={"factor": 1e-9, "drop": "position", "group_tokens": 0})
        policy.begin(moment(TOKENS))
        output = block(hidden()[None])[0]
        untouched = (routers[0].weights_TK == 0).all(dim=1)
        assert untouched.sum() >= TOKENS - EXPERTS
        assert (output[untouched] == 0).all()
        assert (kept > 0).all()


@pytest.mark.parametrize("model_type", sorted(RULES))
def test_forced_balance(model_type):
    tokens = 3 * EXPERTS
    with watch(stock(model_type)) as routers:
        policy = attach_policy("balanced", routers, arguments={})
        policy.begin(moment(tokens, first=5))
        for router, output in zip(routers, forward(routers, hidden(tokens)), strict=True):
            expected = np.array([[((n + 5) * 2 + k) % EXPERTS for k in range(2)] for n in range(tokens)])
            assert (output[2].numpy() == expected).all()
            assert (np.bincount(expected.ravel()) == 2 * tokens / EXPERTS).all()
            weights = reference_weights(clean_logits(router, hidden(tokens)), expected, RULES[model_type])
            assert output[1].detach().numpy() == pytest.approx(weights, abs=2e-6)


@pytest.mark.parametrize(
    ("name", "router", "others"), [("frozen", False, True), ("warmup", True, False), ("warmup", True, True)]
)
def test_who_is_held_back(name, router, others):
    model = stock()
    with watch(model) as routers:
        policy = attach_policy(
            name, routers, arguments=arguments_of(name, {"router_steps": 4} if name[0] == "w" else {})
        )
        policy.begin(moment(17, step=4 if others else 3))
        model(input_ids=torch.arange(3, 20)[None], use_cache=False).logits.square().mean().backward()
        policy.before_step(model.parameters())
        mine = {id(parameter) for one in routers for parameter in one.module.parameters()}
        for parameter in model.parameters():
            assert (parameter.grad is not None) == (router if id(parameter) in mine else others)
        assert [one.learns for one in routers] == [router] * 2


def test_a_selection_bias_and_noise_do_not_go_together():
    model = stock("glm4_moe")
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = 0.1
    with (
        watch(model) as routers,
        pytest.raises(UsageError, match=r"layers\.1\.mlp\.gate: its selection bias is not zero"),
    ):
        attach_policy("noisy_topk", routers, arguments={"coefficient": 0.01, "compat": False})
