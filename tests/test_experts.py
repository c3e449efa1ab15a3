"""The experts function on the experts of stock classes, against the library's own loop and against float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from prismoe.errors import UsageError
from prismoe.train import experts as of_experts
from prismoe.train.experts import experts_in_use, sorted_experts, use_experts
from tests.training import tiny_moe

E, D, W = 6, 20, 13  # rows of 13 numbers: grouped_mm refuses them
CLASSES = {
    "plain": [MixtralExperts, GraniteMoeExperts, OlmoeExperts, Qwen2MoeExperts, Qwen3MoeExperts],
    "transposed": [AriaExperts],
    "transposed, interleaved, with biases": [GptOssExperts],
    "without a gate": [NemotronHExperts],
    "normed afterwards": [MuseSparkExperts],
}
ALL = [kind for kinds in CLASSES.values() for kind in kinds]


def experts(kind: type[Any], *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A module of `kind` with every name that one of the classes asks its config for."""
    names = {
        **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), E),
        **dict.fromkeys(("hidden_size", "moe_hidden_size"), D),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), W),
        **dict.fromkeys(("hidden_act", "mlp_hidden_act"), "silu"),
        **{"moe_latent_size": None, "post_norm_eps": 1e-6, "swiglu_alpha": 1.7, "swiglu_limit": 7.0},
    }
    module = kind(SimpleNamespace(**names, _experts_implementation="eager"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module.to(dtype)


def inputs(tokens: int, top_k: int, *, dtype: torch.dtype = torch.float64, empty: int = 2) -> tuple[Any, Any, Any]:
    """Hidden states, choices among the first E - `empty` experts, and weights."""
    generator = torch.Generator().manual_seed(tokens)
    x_TD = torch.randn(tokens, D, generator=generator).to(dtype).requires_grad_()
    index_TK = torch.rand(tokens, E - empty, generator=generator).topk(top_k).indices
    return x_TD, index_TK, torch.rand(tokens, top_k, generator=generator).to(dtype).requires_grad_()


def everything(forward: Any, module: Any, given: tuple[Any, Any, Any], *, autocast: bool = False) -> list[torch.Tensor]:
    """The output and all gradients of an uneven sum of it, in float64."""
    x_TD, index_TK, weights_TK = given
    leaves = [x_TD, weights_TK, *module.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out_TD = forward(module, x_TD, index_TK, weights_TK)
    slopes = torch.linspace(-1, 2, out_TD.numel(), dtype=torch.float64).view_as(out_TD)
    gradients = torch.autograd.grad((out_TD.double() * slopes).sum(), leaves)
    return [found.detach().double() for found in (out_TD, *gradients)]


def eager(module: Any, *given: torch.Tensor) -> torch.Tensor:
    assert module.config._experts_implementation == "eager"
    out: torch.Tensor = module(*given)
    return out


def tolerance(kind: type[Any]) -> float:
    """Relative, in float64; the norm behind the experts of one class computes in float32 itself."""
    return 1e-6 if kind is MuseSparkExperts else 1e-12


def largest_error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all tensors, the largest norm of a difference as a share of the norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_outputs_and_gradients_are_those_of_the_library(kind: type[Any]) -> None:
    exact = everything(eager, experts(kind), inputs(37, 3))
    assert largest_error(everything(sorted_experts, experts(kind), inputs(37, 3)), exact) < tolerance(kind)
    single = experts(kind, dtype=torch.float32)
    assert largest_error(everything(sorted_experts, single, inputs(37, 3, dtype=torch.float32)), exact) < 1e-6


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_in_bfloat16_the_error_is_that_of_the_library(kind: type[Any]) -> None:
    # Both round what lies between the products: 8 bits, so about 4e-3 at each of a few places.
    module, given = experts(kind, dtype=torch.bfloat16), inputs(300, 3, dtype=torch.bfloat16)
    exact_given = (given[0].detach().double().requires_grad_(), given[1], given[2].detach().double().requires_grad_())
    exact = everything(eager, experts(kind).to(torch.bfloat16).double(), exact_given)
    theirs, ours = (largest_error(everything(forward, module, given), exact) for forward in (eager, sorted_experts))
    assert ours < 1.3 * theirs
    assert ours < 2e-2


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded numbers of rows for every dtype: in float64 it shows that free rows add nothing at all."""
    monkeypatch.setattr(of_experts, "_compiled_by_size", lambda x: True)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("rounded")
def test_rounded_numbers_of_rows_change_nothing(kind: type[Any]) -> None:
    module, given = experts(kind), inputs(301, 3)
    assert any(count % 8 for count in torch.bincount(given[1].reshape(-1)).tolist())
    assert largest_error(everything(sorted_experts, module, given), everything(eager, module, given)) < tolerance(kind)


def test_numbers_of_rows_recur_and_are_at_most_a_sixteenth_more() -> None:
    rows = [of_experts._round_up(count) for count in range(4097)]
    assert all(count <= more <= count * 17 / 16 for count, more in enumerate(rows))
    assert rows[:33] == list(range(33))
    assert len({more for more in rows if 1024 < more <= 2048}) == 16


def test_under_autocast_products_are_in_its_dtype_and_gradients_in_that_of_the_weights() -> None:
    module, given = experts(MixtralExperts, dtype=torch.float32), inputs(64, 2, dtype=torch.float32)
    exact = everything(sorted_experts, module, given)
    error = largest_error(everything(sorted_experts, module, given, autocast=True), exact)
    assert 1e-4 < error < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        out_TD = sorted_experts(module, *given)
    out_TD.sum().backward()  # an expanded gradient
    assert out_TD.dtype == torch.float32
    assert module.gate_up_proj.grad.dtype == torch.float32


def test_experts_without_a_token_get_a_gradient_of_zero() -> None:
    module = experts(MixtralExperts)
    sorted_experts(module, *inputs(5, 1)).sum().backward()
    idle = [e for e in range(E) if e not in inputs(5, 1)[1]]
    assert set(idle) >= {E - 2, E - 1}
    for parameter in module.parameters():
        assert not parameter.grad[idle].any()
        assert parameter.grad.flatten(1).any(dim=1).sum() == E - len(idle)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_one_token(kind: type[Any]) -> None:
    module, given = experts(kind), inputs(1, 3)
    exact = everything(eager, module, given)
    assert largest_error(everything(sorted_experts, module, given), exact) < tolerance(kind)
    with torch.no_grad():
        assert largest_error([sorted_experts(module, *given)], exact[:1]) < tolerance(kind)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("tokens", [1, 9, 301])
@pytest.mark.usefixtures("rounded")
def test_choices_of_other_processes_add_nothing(kind: type[Any], tokens: int) -> None:
    module, (x_TD, index_TK, weights_TK) = experts(kind), inputs(tokens, 3)
    elsewhere = index_TK == 1
    elsewhere[0, 0] = True
    with torch.no_grad():
        weights_TK[elsewhere] = 0.0
    exact = everything(eager, module, (x_TD, index_TK, weights_TK))
    found = everything(sorted_experts, module, (x_TD, index_TK.masked_fill(elsewhere, E), weights_TK))
    exact[2][elsewhere] = 0.0  # the router learns nothing of them
    hit = [e for e in range(E) if e in index_TK[~elsewhere]]
    for a, b in zip(found[:3], exact[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for a, b in zip(found[3:], exact[3:], strict=True):
        if a.shape[0] == E:
            torch.testing.assert_close(a[hit], b[hit], rtol=1e-12, atol=1e-12)
    module._is_expert_parallel = True
    with torch.no_grad():
        alone = sorted_experts(module, x_TD, index_TK.masked_fill(elsewhere, E), weights_TK)
    torch.testing.assert_close(alone, exact[0], rtol=1e-12, atol=1e-12)


def test_no_token_at_all() -> None:
    module = experts(MixtralExperts)
    x_TD = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    out_TD = sorted_experts(module, x_TD, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert out_TD.shape == (0, D)
    out_TD.sum().backward()
    assert not module.down_proj.grad.any()


def test_gradients_by_differences() -> None:
    module, (x_TD, index_TK, weights_TK) = experts(MixtralExperts), inputs(4, 2)

    def forward(*leaves: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, leaves[2:], strict=True)), _Inputs(leaves, index_TK))

    names = [name for name, _ in module.named_parameters()]
    module.forward = lambda given: sorted_experts(module, given.leaves[0], given.index_TK, given.leaves[1])
    assert torch.autograd.gradcheck(forward, (x_TD, weights_TK, *module.parameters()))


class _Inputs:
    def __init__(self, leaves: tuple[torch.Tensor, ...], index_TK: torch.Tensor) -> None:
        self.leaves, self.index_TK = leaves, index_TK


def test_frozen_experts_have_no_gradient_and_pass_it_on() -> None:
    module, given = experts(MixtralExperts), inputs(9, 2)
    exact = everything(eager, module, given)
    module.requires_grad_(requires_grad=False)
    x_TD, weights_TK = given[0], given[2]
    out_TD = sorted_experts(module, *given)
    slopes = torch.linspace(-1, 2, out_TD.numel(), dtype=torch.float64).view_as(out_TD)
    found = torch.autograd.grad((out_TD * slopes).sum(), [x_TD, weights_TK])
    assert largest_error(list(found), exact[1:3]) < 1e-12


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "granitemoeshared"])
def test_a_whole_model_computes_the_same_logits(tmp_path: Any, model_type: str) -> None:
    folder = tiny_moe(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 43).view(2, 20)
    logits = {}
    for wanted in ("eager", "grouped_mm", "sorted", "auto"):
        use_experts(model, wanted)
        assert experts_in_use(model) == ("sorted" if wanted == "auto" else wanted)
        with torch.no_grad():
            logits[wanted] = model(ids).logits
    assert torch.equal(logits["auto"], logits["sorted"])
    assert model.config._experts_implementation == "prismoe_sorted"
    for found in logits.values():
        torch.testing.assert_close(found, logits["eager"], rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert "prismoe" not in (tmp_path / "saved" / "config.json").read_text()


def test_a_dense_model_has_no_experts() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    model = AutoModelForCausalLM.from_config(config)
    use_experts(model, "grouped_mm")
    assert experts_in_use(model) is None


def test_on_a_device_experts_of_odd_sizes_take_the_other_way() -> None:
    for width, used in ((32, "grouped_mm"), (28, "sorted")):
        sizes = {"hidden_size": 64, "intermediate_size": width, "num_hidden_layers": 1, "vocab_size": 8}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes))
        use_experts(model, device="cuda")
        assert experts_in_use(model) == used
    with pytest.raises(UsageError, match=r"pretrain\.experts: experts with rows of 28 numbers; needed a multiple of 8"):
        use_experts(model, "grouped_mm", device="cuda")
