"""Plans: made from config alone, saved compactly, read back strictly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismoe.checkpoint.tensorfile import header_bytes, read_header
from prismoe.errors import InputError, UsageError
from prismoe.plan import LayerPlan, Origin, Plan, RouterDraw, make_plan, plan_shape, select_layers

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with config.json alone."""
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def handmade(**changes: Any) -> Plan:
    """Overlapping experts, explicit router rows, a shared block and a dense layer: the general case."""
    layer = LayerPlan(
        experts=np.array([[0, 1, 5], [1, 2, 3]], np.int32),
        shared=np.array([4], np.int32),
        router=np.arange(8, dtype=np.float32).reshape(2, 4),
        scale=1.5,
    )
    whole = LayerPlan(
        experts=np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6)),
        shared=np.empty(0, np.int32),
        router=RouterDraw(std=0.02, seed=7),
        scale=1.0,
    )
    fields = {
        "layers": (layer, None, whole),
        "top_k": 2,
        "num_neurons": 6,
        "hidden_size": 4,
        "origin": Origin(method="by hand", arguments={"a": [1, "x"]}, seed=3, source="f" * 64),
    }
    return Plan(**{**fields, **changes})


def assert_equal(found: Plan, wanted: Plan) -> None:
    assert (found.top_k, found.num_neurons, found.hidden_size) == (wanted.top_k, wanted.num_neurons, wanted.hidden_size)
    assert found.origin == wanted.origin
    assert len(found.layers) == len(wanted.layers)
    for mine, other in zip(found.layers, wanted.layers, strict=True):
        if mine is None or other is None:
            assert mine is other
            continue
        assert mine.experts.dtype == mine.shared.dtype == np.int32
        np.testing.assert_array_equal(mine.experts, other.experts)
        np.testing.assert_array_equal(mine.shared, other.shared)
        assert (mine.scale, mine.spread, mine.group) == (other.scale, other.spread, other.group)
        assert mine.noise == other.noise
        assert (mine.redraw is None) == (other.redraw is None)
        if mine.redraw is not None and other.redraw is not None:
            assert mine.redraw.seed == other.redraw.seed
            np.testing.assert_array_equal(mine.redraw.slots, other.redraw.slots)
            np.testing.assert_array_equal(mine.redraw.moments, other.redraw.moments)
        if isinstance(other.router, RouterDraw):
            assert mine.router == other.router
        else:
            np.testing.assert_array_equal(mine.router, other.router)  # type: ignore[arg-type]


def test_reads_back_what_was_saved(tmp_path: Path, source: Path) -> None:
    plans = [
        handmade(),
        make_plan(source, num_experts=6, shared=12, layers="odd", seed=5),
        make_plan(source, method="upcycle", top_k=1),
    ]
    for plan in plans:
        assert_equal(Plan.load(plan.save(tmp_path / "plan.safetensors")), plan)
        assert (tmp_path / "plan.safetensors").read_bytes() == plan.to_bytes()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_partition_survives_the_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    experts, width, shared = (data.draw(st.integers(low, 6)) for low in (1, 1, 0))
    order = np.array(data.draw(st.permutations(range(experts * width + shared))), np.int32)
    layer = LayerPlan(
        experts=np.sort(order[shared:].reshape(experts, width), axis=1),
        shared=np.sort(order[:shared]),
        router=RouterDraw(std=data.draw(st.floats(0, 10)), seed=data.draw(st.integers(0, 2**63 - 1))),
        scale=data.draw(st.floats(1e-6, 1e6)),
    )
    plan = handmade(layers=(layer,), top_k=data.draw(st.integers(1, experts)), num_neurons=order.size)
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    assert_equal(Plan.load(plan.save(path)), plan)


def test_copies_of_everything_take_no_room(tmp_path: Path, source: Path) -> None:
    """The header names them; the file holds no tensor at all. It is a safetensors file that others read."""
    from safetensors import safe_open

    path = make_plan(source, method="upcycle", num_experts=64).save(tmp_path / "plan.safetensors")
    assert path.stat().st_size < 2000
    assert read_header(path)[0] == {}
    path = make_plan(source, num_experts=8).save(tmp_path / "plan.safetensors")
    with safe_open(path, "np") as file:
        assert json.loads(file.metadata()["plan"])["layers"][0]["router"] == {"std": 0.02, "seed": 0}
        np.testing.assert_array_equal(np.sort(file.get_tensor("layers.3.experts"), axis=None), np.arange(96))


def test_same_arguments_same_bytes(source: Path) -> None:
    first = make_plan(source, num_experts=8, seed=1)
    assert first.to_bytes() == make_plan(source, num_experts=8, seed=1).to_bytes()
    assert first.to_bytes() != make_plan(source, num_experts=8, seed=2).to_bytes()
    even = make_plan(source, num_experts=8, seed=1, layers="even")  # a layer's draw does not depend on the others
    np.testing.assert_array_equal(even.layers[2].experts, first.layers[2].experts)  # type: ignore[union-attr]


def test_origin_is_enough_to_make_it_again(source: Path) -> None:
    plan = make_plan(source, num_experts=6, top_k=3, seed=9, layers=[1, 3])
    assert plan.origin.method == "random"
    assert plan.origin.arguments == {
        "num_experts": 6,
        "shared": 0,
        "router": "auto",
        "router_std": 0.02,
        "scale": "auto",
    }
    again = make_plan(
        source, method=plan.origin.method, seed=plan.origin.seed, top_k=3, layers=[1, 3], **plan.origin.arguments
    )
    assert again.to_bytes() == plan.to_bytes()


def test_plan_shape(source: Path) -> None:
    shape = plan_shape(make_plan(source, num_experts=6, shared=12, layers="1-2"))
    assert (shape.num_layers, shape.moe_layers, shape.dense_layers) == (4, (1, 2), (0, 3))
    assert (shape.num_experts, shape.top_k, shape.expert_width, shape.shared_width) == (6, 2, 14, 12)
    assert shape.scales == (3.0,)
    assert plan_shape(handmade()).scales == (1.0, 1.5)
    assert plan_shape(handmade()).expert_width == 6


def test_a_70b_shape_plans_without_weights(tmp_path: Path) -> None:
    changes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    source = tmp_path / "dense"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    for method in ("random", "upcycle"):
        plan = Plan.load(make_plan(source, method=method, num_experts=16).save(tmp_path / "plan.safetensors"))
        assert len(plan.layers) == 80


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("even", (0, 2, 4)),
        ("odd", (1, 3, 5)),
        ("1-3", (1, 2, 3)),
        ("0,3-4", (0, 3, 4)),
        ("5", (5,)),
        (2, (2,)),
        ([4, 1, 4], (1, 4)),
    ],
)
def test_select_layers(layers: Any, chosen: tuple[int, ...]) -> None:
    assert select_layers(layers, 6) == chosen


@pytest.mark.parametrize("layers", ["evn", "", "4-2", "0-6", "-1", "1_0", "٤", [6], [-1], [], "0," * 40, "9" * 5000])
def test_select_layers_refuses(layers: Any) -> None:
    with pytest.raises(
        UsageError, match=r'^layers: .*; needed "all", "even", "odd", "4-27", "0,3" or a list'
    ) as caught:
        select_layers(layers, 6)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"num_experts": 4, "top_k": 5}, "top_k: 5 of 4 experts; needed at most 4"),
        ({"top_k": 0}, "top_k: 0; needed at least 1"),
        ({"seed": -1}, "seed: -1; needed a whole number from 0 to 2**63 - 1"),
        (
            {"method": "randm"},
            "method: unknown 'randm'; needed one of branch, clustering, coactivation, gradient, prune, random, "
            "router_first, upcycle (hint: did you mean random?)",
        ),
        (
            {"num_expert": 4, "shard": 1},
            "method random: unknown argument num_expert; did you mean num_experts?; "
            "unknown argument shard; did you mean shared?",
        ),
        (
            {"num_experts": "8", "shared": True},
            "method random: num_experts is '8', input should be a valid integer; "
            "shared is True, input should be a valid integer",
        ),
        (
            {"scale": True},
            "plan: scale is True, input should be a valid number or input should be 'auto', 'paper', 'mean', 'norm', "
            "'unit', 'measured' or 'none'",
        ),
        (
            {"router": "randm"},
            "router: unknown 'randm'; needed one of centroid, prompts, random, regressed, stored, zero "
            "(hint: did you mean random?)",
        ),
        ({"num_experts": 0}, "method random: num_experts is 0, input should be greater than or equal to 1"),
        (
            {"num_experts": 7},
            "num_experts: 96 neurons less 0 shared do not divide into 7 experts; needed a divisor of 96, nearest 6 or "
            "8 (hint: or shared=5; any expert width is fine, zero-neuron padding is lossless)",
        ),
        (
            {"num_experts": 8, "shared": 90},
            "num_experts: 96 neurons less 90 shared do not divide into 8 experts; needed a divisor of 6, nearest 6 "
            "(hint: fewer shared neurons or fewer experts)",
        ),
    ],
)
def test_refuses_arguments(source: Path, arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(source, **arguments)
    assert str(caught.value) == line
    assert caught.value.exit_code == 2


def broken(**changes: Any) -> LayerPlan:
    layer = handmade().layers[0]
    assert layer is not None
    fields = {"experts": layer.experts, "shared": layer.shared, "router": layer.router, "scale": layer.scale}
    return LayerPlan(**{**fields, **changes})


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (handmade(top_k=3), "top_k 3 of 2 experts"),
        (handmade(layers=(None,)), "no layer has experts"),
        (
            handmade(layers=(broken(), broken(experts=np.zeros((3, 1), np.int32)))),
            "layers with 2 and 3 experts; one model has one number of experts",
        ),
        (
            handmade(layers=(broken(experts=np.array([[0, 6], [1, 2]], np.int32)),)),
            "layer 0: experts name a neuron outside 0..5",
        ),
        (
            handmade(layers=(broken(experts=np.array([[-1, 3], [1, 2]], np.int32)),)),
            "layer 0: experts name a neuron outside 0..5",
        ),
        (
            handmade(layers=(broken(experts=np.array([[0, 0], [1, 2]], np.int32)),)),
            "layer 0: experts are not in ascending order or repeat a neuron",
        ),
        (
            handmade(layers=(broken(shared=np.array([3, 2], np.int32)),)),
            "layer 0: shared are not in ascending order or repeat a neuron",
        ),
        (
            handmade(layers=(broken(router=np.full((2, 4), np.nan, np.float32)),)),
            "layer 0: router [2, 4] is not finite [2, 4]",
        ),
        (
            handmade(layers=(broken(router=np.zeros((2, 3), np.float32)),)),
            "layer 0: router [2, 3] is not finite [2, 4]",
        ),
        (handmade(layers=(broken(scale=0.0),)), "layer 0: scale 0.0 is not a positive number"),
        (
            handmade(layers=(broken(router=RouterDraw(std=-1.0, seed=0)),)),
            "layer 0: router RouterDraw(std=-1.0, seed=0)",
        ),
    ],
)
def test_load_refuses_what_a_plan_may_not_say(tmp_path: Path, plan: Plan, problem: str) -> None:
    path = plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(InputError) as caught:
        Plan.load(path)
    assert str(caught.value) == f"{path}: {problem}"
    assert caught.value.exit_code == 3


def edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The plan file with another header."""
    infos, header = read_header(path)
    del header["sha256"]  # what a person who writes plans by hand does not compute
    body = json.loads(header["plan"])
    edit(body)
    data = path.read_bytes()[min(info.start for info in infos.values()) :]
    entries = [(name, info.dtype, info.shape) for name, info in infos.items()]
    path.write_bytes(header_bytes(entries, metadata={**header, "plan": json.dumps(body)}) + data)
    return path


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda body: body.pop("layers"), r"header is damaged \(KeyError\('layers'\)\)"),
        (lambda body: body.update(num_neurons=10**12), "header is damaged .*is not a count"),
        (lambda body: body.update(num_neurons="6"), "header is damaged .*is not a count"),
        (lambda body: body.update(top_k=True), "top_k True of 2 experts"),
        (lambda body: body.update(layers={"a": 1}), "header is damaged"),
        (lambda body: body["layers"][0].update(num_experts=3), r"layers.0: shape \[2, 3\]; needed 3 rows"),
        (lambda body: body["layers"][0].update(scale="big"), "layer 0: scale big is not a positive number"),
        (lambda body: body["layers"][0].update(scale=10**400), "layer 0: scale 10+ is not a positive number"),
        (lambda body: body["layers"][0].update(router={"std": 1.0}), "header is damaged"),
        (lambda body: body["layers"][0].update(shared=0), "unexpected tensor layers.0.shared"),
        (
            lambda body: body["layers"].insert(0, body["layers"].pop()),
            "layers.1.*: missing or of a wrong dtype|unexpected",
        ),
        (lambda body: body["layers"][2].update(num_experts=10**9), "header is damaged .*is not a count"),
        (lambda body: body["origin"].update(method=1), "origin Origin"),
        (lambda body: body["origin"].update(extra=1), "header is damaged"),
    ],
)
def test_load_refuses_a_hostile_header(tmp_path: Path, edit: Callable[[dict[str, Any]], object], problem: str) -> None:
    path = edited(handmade().save(tmp_path / "plan.safetensors"), edit)
    with pytest.raises(InputError, match=problem):
        Plan.load(path)


def test_every_bit_of_a_plan_counts(tmp_path: Path) -> None:
    path = handmade().save(tmp_path / "plan.safetensors")
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"plan\.safetensors"):
            Plan.load(path)


def test_load_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    path.write_bytes(header_bytes([], metadata={}))
    with pytest.raises(InputError, match=r"format None; needed a plan \(prismoe-plan-1\)"):
        Plan.load(path)
    path.write_bytes(handmade().to_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        Plan.load(path)
