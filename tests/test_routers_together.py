"""Policies on whole stock models: several at once, stock afterwards, computed twice, held back by K = 1, resumed."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from prismoe import registry
from prismoe.config import load_config
from prismoe.errors import InterruptedRun, NumericalError, ResourceError, UsageError
from prismoe.train.alarms import ExpertAlarms, in_short, warnings_of
from prismoe.train.drift import ExpertDrift
from prismoe.train.metrics import read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.routers import arguments_of, attach_policy
from prismoe.train.routing import GradientGuard, LoadMeter, watch
from tests.policies import moment, stock
from tests.training import domain_folder, tiny_moe

POLICIES = registry.names("prismoe.train.routers")
IDS = torch.arange(3, 20)[None]


def run(model, policy):
    """One forward and backward pass; returns the loss."""
    policy.begin(moment(IDS.numel()))
    loss = model(input_ids=IDS, use_cache=False).logits.square().mean() + policy.loss()
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("name", [*POLICIES, ("noisy_topk", "z_loss", "capacity")])
def test_a_policy_leaves_a_stock_model(tmp_path, name):
    """Zero steps: what stock transformers saves afterwards has the bytes of what it saved before."""
    model = stock()
    before = model.state_dict()
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    model.train()
    with watch(model) as routers:
        policy = attach_policy(name, routers, arguments=arguments_of(name, {}))
        run(model, policy)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, expected)  # evaluation is stock all the time
        model.train()
        policy.detach()
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "after" / "model.safetensors").read_bytes() == (
        tmp_path / "before" / "model.safetensors"
    ).read_bytes()
    assert model.state_dict().keys() == before.keys()
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if "Router" in str(hook)]
    assert not hooks


def test_policies_work_in_their_order():
    """Losses add up, capacity drops what the noise chose, and names tell whose number it is."""
    model = stock()
    with watch(model) as routers:
        alone, chosen = [], []
        for name in ("noisy_topk", "z_loss"):
            policy = attach_policy(name, routers, arguments=arguments_of(name, {}))
            policy.begin(moment(IDS.numel()))
            model(input_ids=IDS, use_cache=False)
            alone.append(policy.loss().detach())
            chosen.append(routers[0].chosen_TK)
            policy.detach()
        names = ("noisy_topk", "z_loss", "capacity")
        policy = attach_policy(names, routers, arguments=arguments_of(names, {"capacity": {"factor": 0.5}}))
        policy.begin(moment(IDS.numel()))
        model(input_ids=IDS, use_cache=False)
        assert torch.equal(routers[0].chosen_TK, chosen[0])
        assert (routers[0].weights_TK == 0).any()
        first = policy.metrics()
        assert set(first) == {"noisy_topk.importance_cv2", "noisy_topk.load_cv2", "z_loss.z_loss", "capacity.dropped"}
        assert set(policy.parameters()) == {f"noisy_topk.{router.name}.noise" for router in routers}
    model.zero_grad()
    with watch(model) as routers:
        policy = attach_policy(names[:1] + names[2:], routers, arguments=arguments_of(names[:1] + names[2:], {}))
        with pytest.raises(AssertionError, match="begin comes before"):
            model(input_ids=IDS, use_cache=False)
    assert all(float(loss) > 0 for loss in alone)


@pytest.mark.parametrize("name", ["noisy_topk", "capacity", "bias_balanced", "sparsemixer2"])
def test_activation_checkpointing_draws_the_same_again(name):
    """A layer that is computed a second time in the backward pass gets the same noise and drops: equal gradients."""
    gradients, losses = [], []
    for checkpointing in (False, True):
        model = stock(seed=4)
        if checkpointing:
            model.activation_checkpointing_enable()
        with watch(model) as routers:
            policy = attach_policy(
                name, routers, arguments=arguments_of(name, {"drop": "random"} if name[0] == "c" else {})
            )
            losses.append(run(model, policy))
            if name == "bias_balanced":
                policy.after_step()
                gradients.append(list(policy.state().values()))
            else:
                parameters = [*model.parameters(), *policy.parameters().values()]
                gradients.append([parameter.grad for parameter in parameters if parameter.grad is not None])
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_one_expert_with_renormalised_weights_is_refused_under_every_policy_but_two(name):
    arguments = arguments_of(name, {})
    with watch(stock(top_k=1)) as routers:
        if name in ("frozen", "sparsemixer2"):  # the latter's gradient is not that of the weights
            attach_policy(name, routers, arguments=arguments)
        else:
            with pytest.raises(UsageError, match=r"layers\.0\.mlp\.gate: top_k = 1 with renormalised weights"):
                attach_policy(name, routers, arguments=arguments)
    with watch(stock("qwen2_moe", top_k=1)) as routers:  # its weights are not renormalised
        attach_policy(name, routers, arguments=arguments)


@pytest.mark.parametrize("name", POLICIES)
def test_a_router_without_a_gradient_is_refused_unless_it_is_meant_to_stay(name):
    model = stock()
    with watch(model) as routers:
        wide = {"jitter": 1.0} if name == "sparsemixer2" else {}  # no two logits of so few tokens are nearly equal
        policy = attach_policy(name, routers, arguments=arguments_of(name, wide))
        guard = GradientGuard(routers)
        run(model, policy)
        policy.before_step(model.parameters())
        found = [float(router.module.weight.grad.norm()) if router.learns else 0.0 for router in routers]
        for step in range(1, 5):
            guard.check(found, whole=1.0, step=step)
        if name != "frozen":
            for step in range(2):
                guard.check([found[0], 0.0], whole=1.0, step=step)
            with pytest.raises(NumericalError, match="the router's gradient is zero"):
                guard.check([found[0], 0.0], whole=1.0, step=3)


def test_names_and_arguments_of_several(tmp_path):
    names = ("noisy_topk", "z_loss")
    assert arguments_of(names, {"z_loss": {"coefficient": 0.5}}) == {
        "noisy_topk": {"coefficient": 0.01, "compat": False},
        "z_loss": {"coefficient": 0.5},
    }
    with pytest.raises(UsageError, match=r"arguments for 'coefficient'.*needed one of noisy_topk, z_loss"):
        arguments_of(names, {"coefficient": 0.1})
    with pytest.raises(UsageError, match="one or more different policies"):
        arguments_of(("switch", "switch"), {})
    text = "source: m\nout: o\npretrain:\n  router: [noisy_topk, z_loss]\n  z_loss: {coefficient: 0.5}\n"
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = load_config(path)
    assert tuple(config.pretrain.router) == names
    assert config.pretrain.arguments == {"z_loss": {"coefficient": 0.5}}
    path.write_text(text.replace("z_loss]", "zloss]"))
    with pytest.raises(UsageError, match=r"run\.yaml:4: pretrain\.router has 'zloss'"):
        load_config(path)


def test_noise_weights_and_biases_go_on_bit_for_bit(tmp_path):
    """They are training state: stopped and resumed, the log and the model are those of an unstopped run."""
    source = tiny_moe(tmp_path / "source")
    domains = [domain_folder(tmp_path / "d", tokenizer=source / "tokenizer.json")]
    config = PretrainConfig(
        steps=6, seq_len=32, batch_size=4, micro_batch_size=2, warmup_steps=1, lr=1e-2, max_epochs=50.0, threads=1,
        router=("noisy_topk", "bias_balanced", "warmup"), arguments={"warmup": {"router_steps": 3}},
    )  # fmt: skip
    trained = pretrain(source, config, domains=domains, out=tmp_path / "whole")
    assert trained.router == "noisy_topk + bias_balanced + warmup"
    assert any("the saved model routes without the bias" in text for text in trained.warnings)
    for stop_after in (2, 4):

        def stopping(what, done, total, stop_after=stop_after):
            if what.startswith("train step") and done == stop_after:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(InterruptedRun):
            pretrain(source, config, domains=domains, out=tmp_path / "parts", on_progress=stopping)
        found = tmp_path / "parts" / "checkpoints" / f"step-{stop_after:08d}"
        stored = {name for path in found.glob("*.safetensors") for name in load_file(path)}
        assert {name.partition(".")[0] for name in stored if "noisy_topk" in name} == {
            *("policy", "exp_avg", "exp_avg_sq", "step")
        }
    pretrain(source, config, domains=domains, out=tmp_path / "parts")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    only = [line["warmup.routers_only"] for line in lines if line["event"] == "step"]
    assert only == [1.0] * 3 + [0.0] * 3
    cosines = [line["expert_cosine"] for line in lines if line["event"] == "eval"]
    assert cosines[0] == [1.0, 1.0]
    assert all(0.5 < cosine < 0.9999 for cosine in cosines[-1])


def test_micro_batches_of_another_size(tmp_path):
    """Drops and selection biases are of whole sequences and steps; balance losses are not, and a run keeps its size."""
    source = tiny_moe(tmp_path / "source")
    domains = [domain_folder(tmp_path / "d", tokenizer=source / "tokenizer.json")]
    settings = {"steps": 3, "seq_len": 32, "batch_size": 4, "warmup_steps": 1, "lr": 1e-2, "threads": 1}
    settings |= {"max_epochs": 50.0, "eval_tokens": 100}
    found = {}
    for size in (0, 1):
        config = PretrainConfig(**settings, router=("bias_balanced", "capacity"), micro_batch_size=size)
        pretrain(source, config, domains=domains, out=tmp_path / f"free-{size}")
        lines = read_metrics(tmp_path / f"free-{size}" / "metrics.jsonl")[1:-1]
        keys = ("loss", "gradient_norm", "bias_balanced.moved", "bias_balanced.bias_max", "capacity.dropped")
        found[size] = [[line[key] for key in keys] for line in lines]
    assert found[0][2][4] > 0
    for whole, parts in zip(found[0], found[1], strict=True):
        assert parts == pytest.approx(whole, rel=1e-5)

    out = tmp_path / "switch"
    config = PretrainConfig(**settings, micro_batch_size=2)
    with pytest.raises(InterruptedRun):
        pretrain(source, replace(config, max_steps=2), domains=domains, out=out)
    with pytest.raises(ResourceError, match=r"pretrain\.sequences_at_once was 2, is 4"):
        pretrain(source, replace(config, micro_batch_size=0), domains=domains, out=out)
    assert pretrain(source, config, domains=domains, out=out).resumed_from == 2


def test_drift_is_the_cosine_of_the_weights():
    model = stock()
    with watch(model) as routers:
        drift = ExpertDrift(model, routers)
        experts = model.model.layers[1].mlp.experts
        before = [matrix.detach().double().clone() for matrix in (experts.gate_up_proj, experts.down_proj)]
        assert drift.cosines() == [1.0, 1.0]
        with torch.no_grad():
            experts.gate_up_proj.add_(0.2 * torch.randn_like(experts.gate_up_proj))
            experts.down_proj.mul_(4.0)  # a factor is no drift
        found = drift.cosines()
        now = [matrix.detach().double() for matrix in (experts.gate_up_proj, experts.down_proj)]
    each = [
        float((a[e] * b[e]).sum() / a[e].norm() / b[e].norm())
        for a, b in zip(before, now, strict=True)
        for e in range(len(a))
    ]
    assert found[0] == 1.0
    assert found[1] == pytest.approx(sum(each) / len(each), abs=1e-6)
    assert found[1] < 0.99


def test_a_process_that_holds_no_expert_adds_nothing_to_the_drift():
    model = stock()
    with watch(model) as routers:
        for layer in model.model.layers:  # four experts on three processes: the third holds none
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(layer.mlp.experts, name)
                setattr(layer.mlp.experts, name, torch.nn.Parameter(whole.detach()[:0]))
        others = torch.tensor([[0.0, 0.0], [6.0, 8.0], [8.0, 8.0]], dtype=torch.float64)
        assert ExpertDrift(model, routers, total=lambda sums: sums + others).cosines() == [0.75, 1.0]


def test_alarms():
    """Expert 0 of 6 is chosen by every token: a fair share is a third, so more than two thirds dominate."""
    model = stock()
    with watch(model) as routers, torch.no_grad():
        routers[1].module.weight.zero_()  # ties: the first experts get everything
        model(input_ids=IDS, use_cache=False)
        meter = LoadMeter(routers)
        meter.add()
        result = meter.result()
    assert result["dominant_by_layer"][1] == 2
    assert result["idle_by_layer"][1] == 4
    assert in_short({**meter.summary(), "dropped": 0.25}).endswith("dominant experts, 25% dropped")
    assert in_short({"idle": 0, "dominant": 0, "dropped": 0.05}) == ""
    found = warnings_of("switch", {"coefficient": 0}, last_step={}, last=result)
    assert found[0] == "the balance loss of router policy 'switch' is off (coefficient 0)"
    assert f"{result['idle']} experts got no token of the held-out text (mixture layers" in found[1]
    assert f"{result['dominant']} experts were chosen by most tokens of the held-out text" in found[2]
    found = warnings_of(
        ("capacity", "bias_balanced"),
        {"capacity": {}, "bias_balanced": {}},
        last_step={"capacity.dropped": 0.3, "bias_balanced.moved": 0.021},
        last={"idle": 0, "dominant": 0},
    )
    assert found == [
        "the saved model routes without the bias: 2.1% of assignments go to other experts",
        "30% of assignments were dropped in the last step: their experts were full",
    ]


def test_alarms_of_experts_over_time():
    """Four experts, two of a token: a fair share is half of the tokens, dominant is more than three quarters."""

    def layer(*loads):
        return [[4, 4, 4, 4], list(loads)]

    alarms, lines = ExpertAlarms([(4, 2), (4, 2)]), []
    for step in range(1, 126):
        # Idle in most steps is still not starved; then expert 3 is, and later expert 0 takes every token.
        alarms.add(
            layer(5, 5, 5, 1 - step % 2) if step <= 30 else layer(5, 5, 5, 0) if step <= 80 else layer(8, 4, 4, 0)
        )
        again = ExpertAlarms([(4, 2), (4, 2)])
        again.restore(json.loads(json.dumps(alarms.state())))
        lines.append(again.judge(step))
        assert alarms.judge(step) == lines[-1]
        assert again.state() == alarms.state()
    alarm, further = [line for line in lines if line]
    assert alarm["step"] == 75  # 3 of 378 assignments in steps 26 to 50 are 0.032 of a fair share
    assert alarm["starved"] == [{"layer": 1, "expert": 3, "of_fair_share": 0.0}]
    assert further["step"] == 100
    assert further["dominant"] == [{"layer": 1, "expert": 0, "of_fair_share": pytest.approx(4 * 185 / 395, abs=1e-4)}]
    assert alarms.in_short() == (
        " · ALARM: starved expert 3 of mixture layer 1 and dominant expert 0 of mixture layer 1"
    )
    found = warnings_of("switch", {}, last_step={}, last={}, alarm=further)
    assert found[0] == "starved since step 100 or before: expert 3 of mixture layer 1"
    for _ in range(25):
        alarms.add(layer(4, 4, 4, 4))
    assert alarms.judge(150) == {"event": "alarm", "step": 150, "starved": [], "dominant": []}
    assert alarms.in_short() == ""
