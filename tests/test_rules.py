"""Mixing rules against published numbers and plain formulas, and a rule at work on a mixture."""

from __future__ import annotations

import json
import math

import pytest

from prismoe import registry
from prismoe.data.mixture import Mixture
from prismoe.data.rules import Mixing
from prismoe.data.shards import Domain
from prismoe.data.weights import PRESETS, multiplied, smoothed
from prismoe.errors import InputError, NumericalError, UsageError
from tests.test_mixture import numbered

# LLaMA-2-7B on SlimPajama's validation text, with the digits of LLaMA-MoE's published code.
REFERENCE = {
    "books": 1.925248146057129,
    "wikipedia": 1.5899001359939575,
    "stackexchange": 1.4974864721298218,
    "github": 0.6984495520591736,
    "c4": 2.074881076812744,
    "commoncrawl": 1.6916865110397339,
    "arxiv": 1.2408167123794556,
}
LOSSES = {
    "books": 2.071,
    "wikipedia": 1.572,
    "stackexchange": 1.491,
    "github": 0.705,
    "c4": 2.117,
    "commoncrawl": 1.728,
    "arxiv": 1.287,
}
NAMES = ("commoncrawl", "c4", "github", "wikipedia", "books", "arxiv", "stackexchange")
RELEASED = (0.668748, 0.150602, 0.043612, 0.042559, 0.050124, 0.025215, 0.019140)
CLIPPED = (0.668204, 0.150469, 0.043563, 0.043279, 0.050070, 0.025180, 0.019235)


def rule(name: str) -> object:
    return registry.load("prismoe.data.rules", name, where="rule")


@pytest.mark.parametrize(("form", "expected"), [("released", RELEASED), ("paper", CLIPPED)])
def test_sheared_gives_the_check_values(form: str, expected: tuple[float, ...]) -> None:
    found = rule("sheared").update(PRESETS["llama1"], LOSSES, REFERENCE, form=form)  # type: ignore[attr-defined]
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-15)
    assert {name: round(found[name], 6) for name in NAMES} == dict(zip(NAMES, expected, strict=True))


@pytest.mark.parametrize(("form", "expected"), [("released", RELEASED), ("paper", CLIPPED)])
def test_the_check_values_need_the_reference_with_all_its_digits(form: str, expected: tuple[float, ...]) -> None:
    """Papers and configs print the reference losses with four digits: that moves a weight by up to 5e-6, so the sixth
    digit of the check values is that of the full reference, and the fifth is right with either."""
    rounded = {name: round(loss, 4) for name, loss in REFERENCE.items()}
    found = rule("sheared").update(PRESETS["llama1"], LOSSES, rounded, form=form)  # type: ignore[attr-defined]
    moved = max(abs(found[name] - value) for name, value in zip(NAMES, expected, strict=True))
    assert 1e-6 < moved < 5e-6


def test_sheared_from_any_weights_is_the_formula() -> None:
    update = rule("sheared").update  # type: ignore[attr-defined]
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    losses, reference = {"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 2.5, "b": 2.0, "c": 2.0}
    raw = {"a": 0.5 * math.exp(2 * 0.5), "b": 0.3 * math.exp(2 * -1.0), "c": 0.2}
    total = sum(raw.values())
    for c in (0.0, 0.01):
        found = update(weights, losses, reference, eta=2.0, smoothing=c)
        assert found == pytest.approx({n: (1 - c) * raw[n] / total + c / 3 for n in raw}, abs=1e-15)
    raw["b"] = 0.3  # below its reference: left as it is
    total = sum(raw.values())
    assert update(weights, losses, reference, eta=2.0, form="paper") == pytest.approx(
        {n: raw[n] / total for n in raw}, abs=1e-15
    )
    assert update(weights, losses, reference, eta=0.0, form="paper") == pytest.approx(weights, abs=1e-15)


def test_doremi_clips_smooths_and_averages() -> None:
    module = rule("doremi")
    weights, history = {"a": 0.5, "b": 0.5}, []
    for losses in ({"a": 3.0, "b": 1.0}, {"a": 2.0, "b": 4.0}):
        gain = {"a": math.exp(max(0.0, losses["a"] - 2.0)), "b": math.exp(max(0.0, losses["b"] - 2.0))}
        total = sum(weights[n] * gain[n] for n in weights)
        expected = {n: 0.999 * weights[n] * gain[n] / total + 0.001 / 2 for n in weights}
        weights = module.update(weights, losses, {"a": 2.0, "b": 2.0})  # type: ignore[attr-defined]
        assert weights == pytest.approx(expected, abs=1e-15)
        history.append(weights)
    mean = {n: (history[0][n] + history[1][n]) / 2 for n in weights}
    assert module.result(history) == pytest.approx(mean, abs=1e-15)  # type: ignore[attr-defined]


def test_a_domain_left_out_stays_out_and_no_gain_is_too_large() -> None:
    weights = {"a": 0.5, "b": 0.5, "out": 0.0}
    moved = multiplied(weights, {"a": 5000.0, "b": 4999.0, "out": 1e9})
    assert moved == pytest.approx({"a": 1 / (1 + math.exp(-1)), "b": 1 / (1 + math.e), "out": 0.0}, abs=1e-15)
    assert smoothed(moved, share=0.1)["out"] == 0.0
    assert math.fsum(smoothed(moved, share=0.1).values()) == pytest.approx(1, abs=1e-15)
    # The other end: weight is all but gone, and smoothing brings it back.
    gone = multiplied({"a": 0.5, "b": 0.5}, {"a": 0.0, "b": -700.0})
    assert smoothed(gone, share=1e-4)["b"] == pytest.approx(0.5e-4, abs=1e-15)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> list[Domain]:
    folder = tmp_path_factory.mktemp("seven")
    return [numbered(folder / name, 2000) for name in NAMES]


def mixture(seven: list[Domain], weights: dict[str, float] | str = "llama1", **more: float) -> Mixture:
    return Mixture(seven, weights=weights, **{"seq_len": 16, "batch_size": 8, "max_epochs": 99, **more})  # type: ignore[arg-type]


def test_a_rule_moves_the_mixture_where_it_is_due(seven: list[Domain]) -> None:
    mix = mixture(seven)
    mixing = Mixing(mix, rule="sheared", reference=REFERENCE, interval_tokens=16 * 8 * 10 + 100)
    assert [step for step in range(35) if mixing.due(step)] == [10, 20, 30]
    assert mixing.update(0, LOSSES) is None
    assert mixing.update(11, LOSSES) is None
    assert mix.history == [{"step": 0, "weights": PRESETS["llama1"]}]
    line = mixing.update(10, LOSSES)
    assert line is not None
    assert line["before"] == PRESETS["llama1"]
    assert line["after"] == mix.weights(10) == mixing.result()
    assert round(line["after"]["commoncrawl"], 6) == RELEASED[0]
    assert line["excess"]["books"] == LOSSES["books"] - REFERENCE["books"]
    assert mix.weights(9) == PRESETS["llama1"]
    json.dumps(line, allow_nan=False)
    # A resumed run has nothing but the history, and moves on to the same bits.
    resumed = mixture(seven)
    resumed.restore(json.loads(json.dumps(mix.history)))
    again = Mixing(resumed, rule="sheared", reference=REFERENCE, interval_tokens=16 * 8 * 10)
    mixing.update(20, LOSSES)
    again.update(20, LOSSES)
    assert resumed.history == mix.history
    assert (resumed.batch(25).input_ids == mix.batch(25).input_ids).all()


def test_doremi_recommends_the_average(seven: list[Domain]) -> None:
    mixing = Mixing(mixture(seven, "uniform"), rule="doremi", reference=REFERENCE, interval_tokens=128)
    assert mixing.result() == dict.fromkeys(mixing.mixture.names, 1 / 7)
    first = mixing.update(1, LOSSES)
    second = mixing.update(2, {**LOSSES, "arxiv": 3.0})
    assert first is not None
    assert second is not None
    for name in NAMES:
        assert mixing.result()[name] == pytest.approx((first["after"][name] + second["after"][name]) / 2, abs=1e-15)


def test_static_never_moves(seven: list[Domain]) -> None:
    mixing = Mixing(mixture(seven), interval_tokens=1)
    assert not any(mixing.due(step) for step in range(100))
    assert mixing.update(10, LOSSES) is None
    assert mixing.result() == PRESETS["llama1"]


def test_bad_mixing(seven: list[Domain]) -> None:
    mix = mixture(seven)
    with pytest.raises(UsageError) as caught:
        Mixing(mix, rule="sheared")
    assert str(caught.value) == (
        "pretrain.reference: sheared without reference losses; needed a loss for each domain "
        "(hint: measure them with `prismoe reference-loss MODEL DATA --out reference.json`)"
    )
    with pytest.raises(InputError, match="no reference loss for books, github; needed one for each domain"):
        Mixing(mix, rule="sheared", reference={n: 1.0 for n in NAMES if n not in ("github", "books")})
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(InputError, match=rf"pretrain.reference arxiv: {bad}; needed a finite loss"):
            Mixing(mix, rule="doremi", reference={**REFERENCE, "arxiv": bad})
    with pytest.raises(UsageError, match="127 tokens, less than a step of 128; needed one step or more"):
        Mixing(mix, rule="sheared", reference=REFERENCE, interval_tokens=127)
    with pytest.raises(UsageError, match=r"unknown 'sheard'.*did you mean sheared"):
        Mixing(mix, rule="sheard", reference=REFERENCE)
    for arguments, message in (
        ({"form": "printed"}, "form is 'printed'"),
        ({"eta": -1.0}, "greater than or equal to 0"),
        ({"smoothing": 1.0}, "less than 1"),
        ({"etta": 1.0}, "unknown argument etta; did you mean eta"),
    ):
        with pytest.raises(UsageError, match=message):
            Mixing(mix, rule="sheared", reference=REFERENCE, arguments=arguments)
    mixing = Mixing(mix, rule="sheared", reference=REFERENCE, interval_tokens=128)
    with pytest.raises(NumericalError, match="held-out loss is nan"):
        mixing.update(1, {**LOSSES, "arxiv": math.nan})
    assert len(mix.history) == 1


def test_a_domain_that_runs_out_under_moved_weights_is_named(seven: list[Domain]) -> None:
    """125 windows of 16 for each domain, 8 rows a step: enough for 109 steps at 1/7, not for 60 at nearly all."""
    mix = mixture(seven, "uniform", max_epochs=1)
    mix.check(100)
    mixing = Mixing(mix, rule="sheared", reference=REFERENCE, interval_tokens=128 * 20)
    line = mixing.update(20, {**LOSSES, "arxiv": 20.0})
    assert line is not None
    # 22 or 23 rows in the 20 steps before, then 8 a step: step 31 is the last that fits.
    mix.batch(31)
    with pytest.raises(UsageError) as caught:
        mix.batch(32)
    assert "domain arxiv: 33 steps read it 1.0 times, over max_epochs 1 from step 32 on" in str(caught.value)
    assert "raise max_epochs" in str(caught.value)
