"""One, two and four real processes (gloo): equal losses, state that moves between layouts, mixtures made in memory."""

import hashlib
import json
import os
import shutil
import signal

import pytest

from prismoe.convert import convert
from prismoe.errors import InterruptedRun
from prismoe.plan import make_plan
from prismoe.train.metrics import read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from tests.ranks import launch
from tests.tiny import tiny_dense
from tests.training import domain_folder

CONFIG = {
    "steps": 6,
    "seq_len": 32,
    "batch_size": 8,
    "warmup_steps": 2,
    "lr": 1e-3,
    "max_epochs": 50.0,
    "threads": 1,
    "eval_every": 3,
    "eval_tokens": 300,
    "timeout": 200.0,
}
NOISY, SWITCH = {**CONFIG, "router": "noisy_topk"}, {**CONFIG, "router": "switch"}


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A dense model, its plan, the mixture of it, two domains, and the runs of one process."""
    base = tmp_path_factory.mktemp("ground")
    dense = tiny_dense(base / "dense", num_hidden_layers=2)
    plan = make_plan(dense, method="random", num_experts=6, top_k=2)
    plan.save(base / "plan.safetensors")
    convert(dense, plan, target="mixtral", out=base / "moe", pad_to=8)
    for seed, name in enumerate("ab"):
        domain_folder(base / name, tokenizer=dense / "tokenizer.json", seed=seed)
    taught = {**NOISY, "teacher": str(base / "dense"), "attend": "document"}
    for name, config in {"noisy": NOISY, "switch": SWITCH, "taught": taught}.items():
        pretrain(base / "moe", PretrainConfig(**config), domains=[base / "a", base / "b"], out=base / f"{name}-1")
    return base


def job(base, out, config, *, source="moe", **more):
    domains = [str(base / name) for name in "ab"]
    return {"source": str(base / source), "out": str(base / out), "domains": domains, "config": config, **more}


@pytest.fixture(scope="module")
def two(ground):
    """What two processes made of it."""
    stop_here(ground, "one-then-two", NOISY, step=4)
    online = {"source": "dense", "plan": str(ground / "plan.safetensors"), "pad_to": 8}
    jobs = [
        job(ground, "switch-2", SWITCH),
        job(ground, "noisy-2", {**NOISY, "save_every": 2, "keep": 3}),
        job(ground, "stopped-2", {**NOISY, "max_steps": 3}, stop_at=99),  # saved right after an evaluation
        job(ground, "stopped-2", NOISY),
        job(ground, "two-then-one", NOISY, stop_at=3),  # saved in the midst of one
        job(ground, "one-then-two", NOISY),
        job(ground, "online-2", NOISY, **online),
        job(ground, "random-2", {**SWITCH, "init": "random"}),
        job(ground, "parts-2", NOISY, rows=50),
        job(ground, "taught-2", {**NOISY, "teacher": str(ground / "dense"), "attend": "document"}),
        job(ground, "fastest-2", {**NOISY, "experts": "fastest"}),
        job(ground, "full-2", {**SWITCH, "save_every": 2}, full_at=3),
        job(ground, "dies-2", {**SWITCH, "save_every": 2}, die_at=4),
    ]
    launch(jobs, ground, world=2)
    return ground


@pytest.fixture(scope="module")
def four(two):
    """What four processes made of it: sharded, in two copies, with whole experts, and from a checkpoint of two."""
    shutil.copytree(two / "two-then-one", two / "two-then-four")
    online = {"source": "dense", "plan": str(two / "plan.safetensors"), "pad_to": 8}
    jobs = [
        job(two, "noisy-4", NOISY),
        job(two, "copies-4", {**SWITCH, "replicate": 2}),
        job(two, "experts-4", {**NOISY, "expert_parallel": 2, "save_every": 2}),
        job(two, "two-then-four", {**NOISY, "expert_parallel": 2}),
        job(two, "online-4", NOISY, **online),
    ]
    launch(jobs, two, world=4)
    return two


def stop_here(base, out, config, *, step):
    def progress(what, done, total):
        if what.startswith("train step") and done == step:
            os.kill(os.getpid(), signal.SIGTERM)

    domains = [base / name for name in "ab"]
    with pytest.raises(InterruptedRun):
        pretrain(base / "moe", PretrainConfig(**config), domains=domains, out=base / out, on_progress=progress)


def assert_alike(first, second, *, rel):
    """Every number of two logs: losses, norms, held-out losses; loads exactly."""
    logs = [read_metrics(folder / "metrics.jsonl") for folder in (first, second)]
    assert [line["event"] for line in logs[0]] == [line["event"] for line in logs[1]]
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "teacher_loss", "gradient_norm", "router_gradient_norm", "by_domain"):
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=rel), (one["step"], key)
        if "router_loss" in one:
            assert other["router_loss"] == pytest.approx(one["router_loss"], rel=10 * rel)
        for name, found in one.get("heldout", {}).items():
            assert other["heldout"][name]["loss"] == pytest.approx(found["loss"], rel=rel)
            # Differences of nearly equal losses of a few documents.
            assert other["heldout"][name]["standard_error"] == pytest.approx(found["standard_error"], rel=100 * rel)
        for key in ("tokens", "load", "idle"):
            assert other.get(key) == one.get(key), (one["step"], key)


def weights(folder):
    path = folder / "model" / "model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def contents(out):
    skipped = ("prismoe.json", "timing.jsonl")
    files = [
        path
        for path in out.rglob("*")
        if path.is_file() and path.name not in skipped and "tensorboard" not in path.parts
    ]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.mark.parametrize("name", ["switch", "noisy", "taught"])
def test_two_processes_have_the_losses_of_one(two, name):
    """One of them with a teacher and documents apart: no forward pass before training may leave weights gathered."""
    assert_alike(two / f"{name}-1", two / f"{name}-2", rel=1e-6)
    assert not (two / f"{name}-2" / "checkpoints").exists()


def test_stopped_and_continued_in_the_same_layout_is_bit_for_bit(two):
    unstopped, stopped = contents(two / "noisy-2"), contents(two / "stopped-2")
    for name in ("metrics.jsonl", "model/model.safetensors", "model/config.json"):
        assert stopped[name] == unstopped[name], name
    assert unstopped.keys() == stopped.keys()


def test_a_rank_that_dies_is_told_with_step_and_phase_and_the_run_goes_on(two):
    said = (two / "dies-2" / "lost.txt").read_text()
    assert said.startswith("step 4, ")
    assert "rank 0 lost the others" in said
    (two / "dies-2" / "lost.txt").unlink()
    domains = [two / "a", two / "b"]
    trained = pretrain(two / "moe", PretrainConfig(**SWITCH, save_every=2), domains=domains, out=two / "dies-2")
    assert trained.resumed_from == 2
    assert_alike(two / "switch-1", two / "dies-2", rel=1e-5)


def test_a_full_disk_of_one_rank_ends_all_of_them_and_the_run_goes_on(two):
    said = [(two / "full-2" / f"full-{rank}.txt").read_text() for rank in range(2)]
    assert all("cannot write: " in line and "step-00000004" in line for line in said), said
    for rank in range(2):
        (two / "full-2" / f"full-{rank}.txt").unlink()
    domains = [two / "a", two / "b"]
    trained = pretrain(two / "moe", PretrainConfig(**SWITCH, save_every=2), domains=domains, out=two / "full-2")
    assert trained.resumed_from == 2
    assert_alike(two / "switch-1", two / "full-2", rel=1e-5)


def test_weights_that_are_drawn_are_the_same_for_any_number_of_processes(two):
    config = PretrainConfig(**{**SWITCH, "init": "random"})
    pretrain(two / "moe", config, domains=[two / "a", two / "b"], out=two / "random-1")
    assert_alike(two / "random-1", two / "random-2", rel=1e-6)


def test_the_loss_in_parts_is_that_of_a_sharded_model_too(two):
    assert_alike(two / "noisy-1", two / "parts-2", rel=1e-5)


def test_all_processes_compute_by_what_the_first_finds_fastest(two):
    assert_alike(two / "noisy-1", two / "fastest-2", rel=1e-5)
    used = json.loads((two / "fastest-2" / "manifest.json").read_bytes())["config"]["result"]["runtime"]["experts"]
    assert json.loads((two / "fastest-2" / "experts.json").read_bytes())["cpu"]["function"] == used


@pytest.mark.parametrize("name", ["one-then-two", "two-then-one"])
def test_state_moves_between_one_and_two_processes(two, name):
    if name == "two-then-one":
        domains = [two / "a", two / "b"]
        copy = shutil.copytree(two / name, two / "two-then-one-here")
        trained = pretrain(two / "moe", PretrainConfig(**NOISY), domains=domains, out=copy)
        assert trained.resumed_from == 3
        assert_alike(two / "noisy-1", copy, rel=1e-5)
    else:
        assert_alike(two / "noisy-1", two / name, rel=1e-5)


def test_a_mixture_made_in_memory_is_the_converted_one(two, four):
    """Convert, then train, against the plan carried out by each process: the same bytes on 1, 2 and 4 of them."""
    plan_file, domains = two / "plan.safetensors", [two / "a", two / "b"]
    from prismoe.plan import Plan

    pretrain(
        two / "dense",
        PretrainConfig(**NOISY),
        domains=domains,
        out=two / "online-1",
        plan=Plan.load(plan_file),
        pad_to=8,
    )
    for world in (1, 2, 4):
        assert weights(two / f"online-{world}") == weights(two / f"noisy-{world}"), world
        model = two / f"online-{world}" / "model"
        for name in ("config.json", "moe.plan", "tokenizer.json"):
            assert (model / name).read_bytes() == (two / "moe" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("name", "reference"), [("noisy-4", "noisy-1"), ("copies-4", "switch-1"), ("experts-4", "noisy-1")]
)
def test_four_processes_have_the_losses_of_one(four, name, reference):
    assert_alike(four / reference, four / name, rel=1e-5)


def test_state_of_two_processes_goes_on_in_four_with_whole_experts(four):
    assert_alike(four / "noisy-1", four / "two-then-four", rel=1e-5)
    assert json.loads((four / "two-then-four" / "manifest.json").read_text())["config"]["result"]["steps"] == 6
