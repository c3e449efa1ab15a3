"""All experts on and fewer and fewer: the dense model at first, the stock router at last, and what lies between."""

import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from prismoe import convert, make_plan
from prismoe.config import load_config
from prismoe.errors import InterruptedRun, UsageError
from prismoe.train.allon import all_on
from prismoe.train.experts import use_experts
from prismoe.train.metrics import read_metrics
from prismoe.train.model import load_model
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.routers import AllOn, arguments_of, attach_policy, check_steps, experts_of_run
from prismoe.train.routers.dense_mi import experts_on
from prismoe.train.routing import LoadMeter, watch
from prismoe.train.unfold import unfolded, unfolding
from tests import golden
from tests.conversions import sharing_plan
from tests.policies import EXPERTS, HIDDEN, RULES, moment, reference_scores, stock, top
from tests.tiny import tiny_dense
from tests.training import domain_folder

TOKENS = 40
ANNEAL = (2, 10)
ARGUMENTS = {"coefficient": 0.3, "anneal": ANNEAL}
IDS = torch.arange(3, 20)[None]


def hidden(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_line_from_all_experts_to_some():
    """By hand: 8 to 2 over 8 steps loses three quarters of an expert a step."""
    found = [experts_on(step, anneal=(2, 10), num_experts=8, top_k=2) for step in range(12)]
    expected = [8.0, 8.0, 8.0, 7.25, 6.5, 5.75, 5.0, 4.25, 3.5, 2.75, 2.0, 2.0]
    assert [count - 1 + part for count, part in found] == expected
    assert [count for count, _ in found] == [8, 8, 8, 8, 7, 6, 5, 5, 4, 3, 2, 2]
    assert all(0 < part <= 1 for _, part in found)


def entropy(shares):
    return -(shares * np.log(shares)).sum(axis=-1)


def reference(logits, rule, step, weight):
    """Experts and weights of one layer, its information, and the weights' slopes by r's share of the class's."""
    above = (EXPERTS - 2) * min(max(ANNEAL[1] - step, 0), 8) / 8
    count = 2 + int(np.ceil(above))
    chosen = top(logits, count)
    kept = np.take_along_axis(reference_scores(logits, rule), chosen, axis=1)
    parts = np.ones(count)
    parts[-1] = above + 2 - (count - 1)
    kept = kept * parts
    own = rule[2] * (kept / kept.sum(axis=1, keepdims=True) if rule[1] else kept)
    share = min(max((ANNEAL[1] - step) / 8, 0), 1)
    probabilities = reference_scores(logits, rule)
    probabilities = probabilities / probabilities.sum(axis=1, keepdims=True)
    information = entropy(probabilities.mean(axis=0)) - entropy(probabilities).mean()
    slope = share * weight * EXPERTS / rule[2] + 1 - share
    return chosen, share * weight * parts + (1 - share) * own, own, slope, information


@pytest.mark.parametrize("step", [0, 5, 9, 10])
@pytest.mark.parametrize("model_type", sorted(RULES))
def test_weights_loss_and_gradient(model_type, step):
    """Against NumPy in float64; the gradient by differences of what the loss would be without the estimate."""
    rule, weight = RULES[model_type], 0.4
    with watch(stock(model_type).double()) as routers:
        for router in routers:
            router.all_on = AllOn(weight)
        policy = attach_policy("dense_mi", routers, arguments=ARGUMENTS)
        policy.begin(moment(TOKENS, step=step))
        total = expected_loss = 0.0
        slopes, logits = [], []
        for router in routers:
            rows = next(parameter for parameter in router.module.parameters() if parameter.shape[-1] == HIDDEN)
            logits.append(hidden().numpy() @ rows.detach().double().numpy().T)
            _, weights, chosen = router.module(hidden())
            expected_chosen, expected, _, _, information = reference(logits[-1], rule, step, weight)
            assert (chosen.sort().values.numpy() == np.sort(expected_chosen)).all()
            order = np.argsort(chosen.numpy(), axis=1), np.argsort(expected_chosen, axis=1)
            found = np.take_along_axis(weights.detach().double().numpy(), order[0], axis=1)
            assert found == pytest.approx(np.take_along_axis(expected, order[1], axis=1), abs=1e-6)
            slopes.append(np.random.default_rng(1).standard_normal((TOKENS, EXPERTS)))  # ∂loss/∂weight by expert
            total = total + (weights * torch.from_numpy(slopes[-1]).gather(1, chosen)).sum()
            expected_loss += information
        loss = policy.loss()
        assert float(loss.detach()) == pytest.approx(-0.3 * expected_loss, rel=1e-5)
        assert policy.metrics()["information"] == pytest.approx(expected_loss / 2, rel=1e-5)
        (total + loss).backward()
        for layer, router in enumerate(routers):
            rows = next(parameter for parameter in router.module.parameters() if parameter.shape[-1] == HIDDEN)

            def value(z, layer=layer):
                chosen, _, own, slope, information = reference(z, rule, step, weight)
                return slope * (own * np.take_along_axis(slopes[layer], chosen, axis=1)).sum() - 0.3 * information

            for e, d in ((0, 0), (3, 7), (5, 15)):
                move = np.zeros((EXPERTS, HIDDEN))
                move[e, d] = 1e-6
                shift = hidden().numpy() @ move.T
                numeric = (value(logits[layer] + shift) - value(logits[layer] - shift)) / 2e-6
                assert float(rows.grad[e, d]) == pytest.approx(numeric, rel=1e-3, abs=1e-4)


def test_large_logits_push_no_infinity_into_the_loss():
    with watch(stock()) as routers:
        policy = attach_policy("dense_mi", routers, arguments=ARGUMENTS)
        policy.begin(moment(TOKENS, step=0))
        for router in routers:
            router.module(1e4 * hidden().float())
        policy.loss().backward()
        assert all(bool(router.module.weight.grad.isfinite().all()) for router in routers)


CASES = {
    target: case
    for kind in ("partition", "shared", "upcycle")
    for case, (_, target, _) in reversed(golden.CASES.items())
    if kind in case and "absorbed" not in case
}


@pytest.mark.parametrize("case", [*sorted(CASES.values()), "llama2 → mixtral: partition", "odd"])
def test_training_starts_as_the_dense_model_and_ends_as_the_mixture(tmp_path, case):
    """Every target, uneven routers, the scale folded or unfolded: dense logits at first, the converted ones at last."""
    source, target, arguments = golden.CASES.get(case, ("llama2", "mixtral", golden.ODD_SCALE))
    dense = golden.make_source(tmp_path / "dense", source)
    plan = make_plan(dense, **arguments)
    convert(dense, plan, target=target, out=tmp_path / "moe")
    model, ids = load_model(tmp_path / "moe"), golden.prompt()
    expected = load_model(dense)(input_ids=ids, use_cache=False).logits.detach()
    converted = model(input_ids=ids, use_cache=False).logits.detach()
    assert (converted - expected).abs().max() > 0.05 or arguments["method"] == "upcycle"
    model.train()
    with watch(model) as routers:
        for factors in (unfolding(plan, model, routers), [1.0] * len(routers)):
            with unfolded(model, routers, factors):
                for router, known in zip(routers, all_on(plan, model, routers), strict=True):
                    router.all_on = known
                policy = attach_policy("dense_mi", routers, arguments=ARGUMENTS)
                for step, wanted in ((0, expected), (ANNEAL[1], converted)):
                    policy.begin(moment(ids.numel(), step=step))
                    with torch.no_grad():
                        found = model(input_ids=ids, use_cache=False).logits
                        policy.loss()
                    assert (found - wanted).abs().max() <= 3e-5
                    assert policy.metrics()["layers_not_dense"] == 0
                policy.detach()


def test_what_is_not_dense_with_all_experts_on(tmp_path):
    """Neurons in some experts and not in others, experts drawn anew, absorbed neurons, and no plan at all."""
    dense = tiny_dense(tmp_path / "dense")
    partition = make_plan(dense, num_experts=4)
    drop = make_plan(dense, method="upcycle", num_experts=4, noise=0.01)
    shared = make_plan(dense, num_experts=4, shared=32)
    plain, with_shared = stock("mixtral"), stock("granitemoeshared")

    def known(plan, model):
        with watch(model) as routers:
            return all_on(plan, model, [routers[0]] * 3)

    assert known(None, plain) == [None] * 3
    assert known(partition, plain) == [AllOn(0.5)] * 3  # scale 4/2
    assert not any(one.exact for plan in (sharing_plan(dense), drop) for one in known(plan, plain))
    held = np.bincount(sharing_plan(dense).layers[0].experts.ravel(), minlength=96)
    assert known(sharing_plan(dense), plain)[0].weight == pytest.approx(1 / (1.5 * held.mean()))
    assert known(shared, with_shared) == [AllOn(0.5)] * 3
    assert known(shared, plain) == [AllOn(0.5, exact=False)] * 3  # absorbed: they would count twice
    whole = replace(shared, layers=tuple(replace(layer, scale=4.0) for layer in shared.layers))
    assert known(whole, plain) == [AllOn(0.25)] * 3
    with watch(plain) as routers:
        assert all_on(partition, plain, [routers[0]] * 3, trained=True) == [AllOn(0.5, exact=False)] * 3


@pytest.mark.parametrize("step", [0, 5])
def test_every_experts_function_takes_more_than_top_k(step):
    """Loss and all gradients are those of "eager", which adds up each expert's tokens by itself."""
    results = {}
    for name in ("eager", "sorted", "grouped_mm"):
        model = stock("qwen3_moe", seed=2)
        use_experts(model, name)
        with watch(model) as routers:
            policy = attach_policy("dense_mi", routers, arguments=ARGUMENTS)
            policy.begin(moment(IDS.numel(), step=step))
            loss = model(input_ids=IDS, use_cache=False).logits.square().mean() + policy.loss()
            loss.backward()
            assert routers[0].chosen_TK.shape == (17, 6 if step == 0 else 5)
        results[name] = [loss.detach(), *(parameter.grad for parameter in model.parameters())]
    for name, found in results.items():
        for one, other in zip(found, results["eager"], strict=True):
            assert torch.allclose(one, other, rtol=1e-4, atol=1e-6), name


def test_loads_and_capacity_count_every_expert():
    """All on, a capacity of 1 holds all assignments and no expert is idle or dominant."""
    model = stock()
    with watch(model) as routers:
        names = ("dense_mi", "capacity")
        policy = attach_policy(names, routers, arguments=arguments_of(names, {"dense_mi": {"anneal": [2, 10]}}))
        policy.begin(moment(IDS.numel(), step=0))
        model(input_ids=IDS, use_cache=False)
        policy.loss()
        assert policy.metrics()["capacity.dropped"] == 0.0
        assert policy.metrics()["dense_mi.experts_on"] == EXPERTS
        meter = LoadMeter(routers)
        meter.add()
        assert meter.counts() == [[17] * EXPERTS] * 2
        assert {key: meter.result()[key] for key in ("idle", "dominant")} == {"idle": 0, "dominant": 0}
        assert meter.result()["max_over_mean"] == [1.0, 1.0]


def test_a_schedule_that_does_not_end_is_refused_and_a_forecast_counts_it(tmp_path):
    for anneal in ([5, 5], [7, 3], [-1, 3]):
        with watch(stock()) as routers, pytest.raises(UsageError, match=r"pretrain\.anneal.*the earlier one first"):
            attach_policy("dense_mi", routers, arguments=arguments_of("dense_mi", {"anneal": anneal}))
    own = arguments_of("dense_mi", {"anneal": [0, 9]})
    check_steps("dense_mi", own, steps=10)
    check_steps("switch", {}, steps=1)
    with pytest.raises(UsageError, match=r"until step 9 of 9.*before the last step.*anneal: \[0, 4\]"):
        check_steps(("switch", "dense_mi"), {"dense_mi": own}, steps=9)
    path = tmp_path / "run.yaml"
    path.write_text("source: m\nout: o\npretrain:\n  router: dense_mi\n  steps: 120\n  anneal: [0, 120]\n")
    with pytest.raises(UsageError, match=r"run\.yaml:3: pretrain\.anneal: experts are on until step 120 of 120"):
        load_config(path)
    path.write_text(path.read_text().replace("0, 120]", "0, 119]"))
    assert load_config(path).pretrain.arguments == {"anneal": (0, 119)}
    size = {"num_experts": 8, "top_k": 2}
    most, mean = experts_of_run("dense_mi", {"coefficient": 0.0, "anneal": (2, 10)}, steps=12, **size)
    assert (most, mean) == (8, pytest.approx((4 * 8 + 7 + 6 + 5 + 5 + 4 + 3 + 2 + 2) / 12))
    assert experts_of_run(("switch", "z_loss"), {}, steps=12, **size) == (2, 2.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = tmp_path_factory.mktemp("run")
    dense = tiny_dense(base / "dense")
    domain_folder(base / "text", tokenizer=dense / "tokenizer.json", documents=20)
    return base, dense


SETTINGS = PretrainConfig(
    model="online", steps=6, seq_len=32, batch_size=4, micro_batch_size=2, warmup_steps=1, lr=1e-3, max_epochs=50.0,
    eval_tokens=500, threads=1, router="dense_mi", arguments={"anneal": [1, 5]},
)  # fmt: skip


def train(run, out, *, plan=None, on_progress=lambda *_: None, **changes):
    base, dense = run
    plan = plan or make_plan(dense, num_experts=4, router_std=0.3)
    config = replace(SETTINGS, **changes)
    trained = pretrain(dense, config, domains=[base / "text"], plan=plan, out=base / out, on_progress=on_progress)
    return trained, read_metrics(base / out / "metrics.jsonl")


def test_a_run_starts_at_the_dense_loss_and_goes_on_bit_for_bit(run):
    trained, lines = train(run, "whole")
    base, dense = run
    alone = replace(SETTINGS, model="dense", steps=1, warmup_steps=0)
    first = pretrain(dense, replace(alone, router="switch", arguments={}), domains=[base / "text"], out=base / "alone")
    assert trained.first_loss == pytest.approx(first.first_loss, rel=1e-6)
    assert trained.heldout_before["text"] > 1.01 * first.heldout_before["text"]  # the stock router speaks there
    steps = [line for line in lines if line["event"] == "step"]
    assert [line["experts_on"] for line in steps] == [4.0, 4.0, 3.5, 3.0, 2.5, 2.0]
    assert [line["share_dense"] for line in steps] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert all(line["layers_not_dense"] == 0 and line["router_gradient_norm"] > 0 for line in steps)
    assert not any("dense" in text or "experts on" in text for text in trained.warnings)

    def stopping(what, done, total):
        if what.startswith("train step") and done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRun):
        train(run, "parts", on_progress=stopping)
    train(run, "parts")
    train(run, "again", recompute=True)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        whole = (base / "whole" / name).read_bytes()
        assert (base / "parts" / name).read_bytes() == whole
        assert (base / "again" / name).read_bytes() == whole


def test_what_a_run_says_when_it_cannot_be_the_dense_model_or_ends_too_early(run):
    _, dense = run
    trained, lines = train(run, "sharing", plan=sharing_plan(dense), steps=3, arguments={"anneal": [0, 1]})
    assert lines[1]["layers_not_dense"] == 3
    assert any("3 mixture layers with all experts on are not the dense layers" in text for text in trained.warnings)
    with pytest.raises(UsageError, match=r"experts are on until step 5 of 5"):
        train(run, "short", steps=5)


def test_what_was_trained_before_is_not_taken_for_the_dense_model(run):
    base, dense = run
    convert(dense, make_plan(dense, num_experts=4, router_std=0.3), target="mixtral", out=base / "moe")
    settings, unlike = replace(SETTINGS, steps=2, arguments={"anneal": [0, 1]}), "are not the dense layers"
    source, found = base / "moe", []
    for out in ("converted", "trained"):
        trained = pretrain(source, settings, domains=[base / "text"], out=base / out)
        steps = [line for line in read_metrics(base / out / "metrics.jsonl") if line["event"] == "step"]
        found.append((steps[0]["layers_not_dense"], [text for text in trained.warnings if unlike in text]))
        source = trained.model
    (new, nothing), (old, (warning,)) = found
    assert (new, old, nothing) == (0, 3, [])
    assert warning.endswith("or they have been trained")
