"""Fine-tunes of one base as experts: right neurons, right mean, stock classes, certificates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from prismoe.account import account
from prismoe.checkpoint import Checkpoint
from prismoe.checkpoint.branches import Branched, branch_key
from prismoe.convert import convert, stream
from prismoe.convert.gather import Gatherer, execute
from prismoe.convert.layout import lay_out
from prismoe.errors import InputError, NumericalError, UsageError
from prismoe.folder import Manifest
from prismoe.plan import Plan, make_plan, plan_shape
from prismoe.recipe import Mean
from prismoe.targets import find_target
from prismoe.verify import verify
from tests import golden, test_kill_convert
from tests.handmade import handmade, weights
from tests.tiny import tiny_dense

TOLERANCE = 2e-5  # max |Δlogit| in float32 where logits reach about 7, as in test_targets
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llama, mean": ("llama", {}, "mixtral", {}),
    "llama bfloat16, base and mean": ("llama", {"dtype": "bfloat16"}, "mixtral", {"with_base": True}),
    "qwen3, middle layer dense": ("qwen3", {"head_dim": 32}, "qwen3_moe", {"layers": "even"}),
    "phi3, fused": ("phi3", {}, "granitemoeshared", {"top_k": 3}),
    "qwen2 tied, rest of the base": ("qwen2", {"tie_word_embeddings": True}, "granitemoeshared", {"rest": "base"}),
}


def branch(base: Path, name: str, *, seed: int, size: float = 0.02) -> str:
    """A copy of `base` beside it with every weight moved by N(0, size²), as training would."""
    folder = base.parent / name
    shutil.copytree(base, folder)
    draw = np.random.default_rng(seed)
    path = folder / "model.safetensors"
    moved = {
        key: (array.astype(np.float32) + size * draw.standard_normal(array.shape, np.float32)).astype(array.dtype)
        for key, array in load_file(path).items()
    }
    save_file(moved, path, metadata={"format": "pt"})
    return str(folder)


def small(folder: Path, count: int = 3) -> tuple[Path, list[str]]:
    """Handmade folders: bfloat16 matrices and float32 norms."""
    branches = [handmade(folder / f"b{seed}", tensors=weights(seed)) for seed in range(1, count + 1)]
    return handmade(folder / "base"), list(map(str, branches))


@dataclass(frozen=True)
class Made:
    base: Path
    folder: Path
    plan: Plan
    logits: np.ndarray
    greedy: np.ndarray


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    """Every case converted once, with what stock dense models put together by hand compute."""
    found = {}
    for number, (case, (family, overrides, target, arguments)) in enumerate(CASES.items()):
        root = tmp_path_factory.mktemp("branches")
        base = tiny_dense(root / "base", family, **overrides)
        branches = [branch(base, f"b{seed}", seed=seed) for seed in (1, 2, 3)]
        plan = make_plan(base, method="branch", branches=branches, router_std=0.3, **arguments)
        folder = root / f"case{number}"
        convert(base, plan, target=target, out=folder)
        logits, greedy = golden.compute(by_hand(base, branches, plan, folder, target))
        found[case] = Made(base, folder, plan, logits, greedy)
    return found


def by_hand(base: Path, branches: list[str], plan: Plan, folder: Path, target: str) -> Any:
    """The stock dense class with averaged weights; each MLP a sum over those of the stock models of the branches."""
    import torch
    from transformers import AutoModelForCausalLM

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    models, written = [load(base), *map(load, branches)], Checkpoint.open(folder)
    arguments = plan.origin.arguments
    chosen = models if arguments["with_base"] else models[1:]
    model = load(base)

    class Routed(torch.nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.experts = [donor.model.layers[index].mlp for donor in chosen]
            rows = written.array(find_target(target).router.format(l=index))
            self.router = torch.from_numpy(rows.astype(np.float32))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept, best = (x @ self.router.T).topk(plan.top_k, dim=-1)
            gates = torch.zeros(*x.shape[:-1], len(self.experts)).scatter(-1, best, kept.softmax(-1))
            found: torch.Tensor = sum(gates[..., e, None] * mlp(x) for e, mlp in enumerate(self.experts))  # type: ignore[assignment]
            return found

    with torch.no_grad():
        if arguments["rest"] == "mean":
            states = [donor.state_dict() for donor in chosen]
            stored = Checkpoint.open(base).tensors
            for name, weight in model.state_dict().items():
                mean = torch.stack([state[name].double() for state in states]).mean(dim=0)
                half = name in stored and stored[name].dtype == "BF16"
                weight.copy_(mean.to(torch.bfloat16) if half else mean)
    for index in plan_shape(plan).moe_layers:
        model.model.layers[index].mlp = Routed(index)
    return model


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_5_computes_what_the_branches_do(made: dict[str, Made], case: str) -> None:
    expected = made[case]
    model, misfits = golden.load(expected.folder)
    assert misfits == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    logits, greedy = golden.compute(model)
    assert np.abs(logits - expected.logits).max() <= TOLERANCE
    assert greedy.tolist() == expected.greedy.tolist()


def test_transformers_4_57_computes_the_same(made: dict[str, Made], tmp_path: Path) -> None:
    library = os.environ.get("PRISMOE_TF4", "")
    if not Path(library, "transformers").is_dir():
        pytest.skip("PRISMOE_TF4 does not name a folder with transformers 4.57 (make test installs it)")
    command = [sys.executable, golden.__file__, str(tmp_path / "o.npz"), *(str(case.folder) for case in made.values())]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": library}, capture_output=True, check=True)
    with np.load(tmp_path / "o.npz") as found:
        for case in made.values():
            assert json.loads(str(found[f"{case.folder.name}/misfits"]))["missing_keys"] == []
            assert np.abs(found[f"{case.folder.name}/logits"] - case.logits).max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_certified(made: dict[str, Made], case: str) -> None:
    certificate = verify(made[case].folder, source=made[case].base, tokens=48)
    checks = {check.name: check.measured for check in certificate.checks}
    assert checks["files"] == checks["recipes"] == checks["carried"] == checks["loading"] == checks["routing"] == 0
    assert 0 < checks["plan"] <= 5e-6
    assert {layer.kind for layer in certificate.layers} <= {"branches", "dense"}
    assert [layer.kind for layer in certificate.layers].count("dense") == (case == "qwen3, middle layer dense")


@pytest.mark.parametrize("rest", ["mean", "base"])
def test_branches_that_never_left_are_the_base(tmp_path: Path, rest: str) -> None:
    base = tiny_dense(tmp_path / "base", dtype="bfloat16")
    twins = [str(shutil.copytree(base, tmp_path / f"b{n}")) for n in range(3)]
    convert(base, make_plan(base, method="branch", branches=twins, rest=rest, router_std=1.0), out=tmp_path / "moe")
    certificate = verify(tmp_path / "moe", source=base)
    assert {layer.kind for layer in certificate.layers} == {"upcycling"}
    checks = {check.name: check for check in certificate.checks}
    assert checks["upcycled"].measured <= 1e-6
    assert checks["logits"].measured <= checks["logits"].limit == 1e-4  # type: ignore[operator]


def test_the_certificate_sees_experts_of_another_branch_and_a_mean_that_is_off(tmp_path: Path) -> None:
    base = tiny_dense(tmp_path / "base", dtype="bfloat16", num_hidden_layers=1)
    branches = [branch(base, f"b{seed}", seed=seed) for seed in (1, 2)]
    convert(base, make_plan(base, method="branch", branches=branches, router_std=0.3), out=tmp_path / "moe")
    path = tmp_path / "moe/model.safetensors"
    honest, at = load_file(path), "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    save_file({**honest, at.format(0): honest[at.format(1)]}, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="also failed: recipes, plan"):
        verify(tmp_path / "moe", source=base, tokens=32)
    embedding = honest["model.embed_tokens.weight"].copy()
    embedding.view(np.uint16)[5, 5] ^= 1  # the last bit of one number
    save_file({**honest, "model.embed_tokens.weight": embedding}, path, metadata={"format": "pt"})
    with pytest.raises(NumericalError, match="also failed: recipes, carried"):
        verify(tmp_path / "moe", source=base, tokens=32)


def nearest(exact: Fraction, *, bits: int, lowest: int) -> float:
    """`exact` rounded to `bits` significant bits, ties to even, no exponent below `lowest`."""
    if not exact:
        return 0.0
    exponent = max(int(np.frexp(float(exact))[1]), lowest) - bits
    return float(round(exact / Fraction(2) ** exponent) * Fraction(2) ** exponent)  # round() of a fraction ties to even


@pytest.mark.parametrize(
    ("dtype", "bits", "lowest"), [(ml_dtypes.bfloat16, 8, -125), (np.float16, 11, -13), (np.float32, 24, -125)]
)
def test_a_mean_is_rounded_once(tmp_path: Path, dtype: Any, bits: int, lowest: int) -> None:
    """Against exact fractions. Row 0 is a hair above a tie: bfloat16 by way of float32 falls to the wrong side."""
    draw = np.random.default_rng(0)
    rows = (draw.standard_normal((4, 64, 16)) * 2.0 ** draw.integers(-14, 3, (4, 64, 1))).astype(dtype)
    rows[:, 0] = np.array([1, 1, 2 + 2.0**-6, 2.0**-38]).astype(dtype)[:, None]
    rows[:, 1] = rows[0, 1]  # all equal: nothing may change
    rows[:, 2] = -0.0
    folders = [tmp_path / f"d{n}" for n in range(4)]
    for folder, numbers in zip(folders, rows, strict=True):
        handmade(folder, tensors={**weights(), "model.embed_tokens.weight": numbers}, vocab_size=64)
    sources = Branched(Checkpoint.open(folders[0]), [Checkpoint.open(folder) for folder in folders[1:]])
    keys = tuple(branch_key(n, "model.embed_tokens.weight") for n in range(4))
    found = execute(sources, Mean(keys, 0, 64))
    exact = [
        sum(map(Fraction, column), Fraction(0)) / 4 for column in rows.astype(np.float64).reshape(4, -1).T.tolist()
    ]
    wanted = np.array([nearest(number, bits=bits, lowest=lowest) for number in exact]).reshape(64, 16)
    np.testing.assert_array_equal(found.astype(np.float64), wanted)
    assert found[1].tobytes() == rows[0, 1].tobytes()
    assert np.signbit(found[2]).all()
    np.testing.assert_array_equal(execute(sources, Mean(keys, 7, 9)), found[7:16])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_plan_takes_each_tensor_from_where_it_says(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Every byte written, against NumPy; equal for any number of threads and shards, and by the same plan read back."""
    root = tmp_path_factory.mktemp("any")
    count, with_base = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    base, branches = small(root, count)
    rest, layers = data.draw(st.sampled_from(["mean", "base"])), data.draw(st.sampled_from(["all", "0", "1"]))
    arguments: dict[str, Any] = {"branches": branches, "with_base": with_base, "rest": rest, "layers": layers}
    if count + with_base < 2:
        with pytest.raises(UsageError, match=r"^branches: 1 branch makes 1 expert; needed at least 2 branches"):
            make_plan(base, method="branch", top_k=1, **arguments)
        return
    plan = make_plan(base, method="branch", top_k=data.draw(st.integers(1, count + with_base)), **arguments)
    assert plan.to_bytes() == make_plan(base, method="branch", top_k=plan.top_k, **arguments).to_bytes()
    plan = Plan.load(plan.save(root / "plan"))
    target = "qwen2_moe"
    convert(base, plan, out=root / "one", target=target)
    files = [load_file(path / "model.safetensors") for path in (base, *map(Path, branches))]
    donors = range(0 if with_base else 1, count + 1)
    written = load_file(root / "one/model.safetensors")
    for name, dense in files[0].items():
        mean = sum(files[n][name].astype(np.float64) for n in donors) / len(donors)
        at = name.split(".")
        if "mlp" in at and layers in ("all", at[2]):
            for expert, donor in enumerate(donors):
                key = ".".join([*at[:4], f"experts.{expert}", *at[4:]])
                axis = 1 if at[4] == "down_proj" else 0
                taken = written.pop(key).take(range(48), axis=axis)  # 16 zero neurons follow
                np.testing.assert_array_equal(taken, files[donor][name])
        elif rest == "base":
            np.testing.assert_array_equal(written.pop(name), dense)
        else:
            np.testing.assert_allclose(written.pop(name).astype(np.float64), mean, rtol=2.0**-8, atol=1e-30)
    own = (".mlp.gate.weight", ".mlp.shared_expert", "_proj.bias")  # router, and what the target has beside
    assert all(any(part in name for part in own) for name in written)
    limit, stream.MOST_WORKERS = stream.MOST_WORKERS, 1
    try:
        convert(base, plan, out=root / "alone", target=target, max_shard_bytes=3000)
    finally:
        stream.MOST_WORKERS = limit
    convert(base, plan, out=root / "many", target=target, max_shard_bytes=3000)
    assert Manifest.read(root / "alone").files == Manifest.read(root / "many").files  # type: ignore[union-attr]


def test_any_window_of_a_mean_is_made_on_its_own(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    sources = Branched.beside(Checkpoint.open(base), branches)
    for name in ("model.norm.weight", "lm_head.weight"):
        recipe = Mean(tuple(branch_key(n, name) for n in (1, 2, 3)), 0, sources.tensors[name].shape[0])
        whole = execute(sources, recipe).tobytes()
        (shard,) = lay_out({"t": recipe}, sources.tensors, max_shard_bytes=1 << 40)
        made = bytearray(len(whole))
        with Gatherer.reading(sources) as gatherer:
            for low in range(0, len(whole), 28):
                part = memoryview(made)[low : low + 28]
                gatherer.fill(shard.pieces[0], low, low + len(part), part)
        assert bytes(made) == whole


def test_a_damaged_branch_is_named(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    damaged = weights(2)
    damaged["lm_head.weight"][3, 3] = np.nan
    handmade(Path(branches[1]), tensors=damaged)
    plan = make_plan(base, method="branch", branches=branches)
    with pytest.raises(InputError, match=rf"^{branches[1]}/model.safetensors: branch 2: lm_head.weight: holds NaN"):
        convert(base, plan, out=tmp_path / "moe")


def test_killed_then_continued_gives_the_same_bytes(tmp_path: Path) -> None:
    base, branches = small(tmp_path)
    plan = make_plan(base, method="branch", branches=branches)
    plan.save(tmp_path / "plan.safetensors")
    counted = test_kill_convert.run(base, tmp_path / "whole", 0)
    assert counted.returncode == 0, counted.stderr
    steps = int(counted.stdout.split()[0])
    for at in (steps // 4, steps // 2, 3 * steps // 4):
        out = tmp_path / f"at{at}"
        assert test_kill_convert.run(base, out, at).returncode == -9
        convert(base, plan, out=out, max_shard_bytes=test_kill_convert.SHARD_BYTES)
        assert test_kill_convert.contents(out) == test_kill_convert.contents(tmp_path / "whole")


def test_the_account_counts_whole_ffns_and_what_is_read(tmp_path: Path) -> None:
    """Per layer 3 · 16 · 48 weights an expert and 3 · 16 router rows, over two layers."""
    base, branches = small(tmp_path)
    shape = plan_shape(make_plan(base, method="branch", branches=branches))
    counts = account(Checkpoint.open(base).family, shape)
    ffn = 3 * 16 * 48
    assert counts.total_parameters == counts.dense_parameters + 2 * (2 * ffn + 3 * 16)
    assert counts.active_parameters == counts.total_parameters - 2 * ffn
    alone = account(Checkpoint.open(base).family, replace(shape, num_branches=0))
    assert counts.convert_seconds - alone.convert_seconds == pytest.approx(3 * 2 * ffn * 2 / 1e9)


def test_real_fine_tunes_of_a_real_model(shared: Path, tmp_path: Path) -> None:
    """stories260K, trained two steps each on two texts by the stock class: certified, and it likes each text better."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Path(shutil.copytree(shared / "models/stories260K", tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = ("def main(self):\n    return self.value\n" * 8, "It was towards evening that we came upon the inn. " * 8)
    ids = [torch.tensor([tokenizer(text).input_ids[:120]]) for text in texts]

    def losses(folder: Path) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return [float(model(input_ids=row, labels=row).loss) for row in ids]

    branches = []
    for number, row in enumerate(ids):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=row, labels=row).loss.backward()
            optimizer.step()
        folder = Path(shutil.copytree(base, tmp_path / f"b{number}"))
        model.save_pretrained(folder)
        branches.append(str(folder))
    plan = make_plan(base, method="branch", branches=branches)
    convert(base, plan, out=tmp_path / "moe")
    certificate = verify(tmp_path / "moe", source=base)
    assert certificate.passed
    before, after = losses(base), losses(tmp_path / "moe")
    assert all(new < old for new, old in zip(after, before, strict=True))
