"""The hash noise: its definition in whole numbers, its statistics, and that it does not care who draws it."""

import math

import numpy as np
import pytest
import torch

from prismoe.train.noise import normal, uniform_bits

MASK = 2**64 - 1


def finish(bits: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood 2014), in unbounded integers."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def reference_bits(seed: int, step: int, layer: int, token: int, expert: int) -> int:
    golden, stream = 0x9E3779B97F4A7C15, 0
    for value in (seed, step, layer):
        stream = finish(((stream + value + 1) * golden) & MASK)
    return finish((finish((token * golden + stream) & MASK) + (expert + 1) * golden) & MASK)


@pytest.mark.parametrize(("seed", "step", "layer"), [(0, 0, 0), (7, 12_345, 31), (2**62, 13_622, 1)])
def test_bits_are_the_hash(seed, step, layer):
    numbers = torch.tensor([0, 1, 4095, 14_680_063])
    found = uniform_bits(seed, step, layer, numbers, 5)
    expected = [[reference_bits(seed, step, layer, int(n), e) for e in range(5)] for n in numbers]
    assert (found.numpy().astype(np.uint64) == np.array(expected, np.uint64)).all()
    noise = normal(seed, step, layer, numbers, 5).double()
    for row, bits in zip(noise, expected, strict=True):
        for value, word in zip(row, bits, strict=True):
            first, second = ((word >> 32) + 0.5) / 2**32, ((word & 0xFFFFFFFF) + 0.5) / 2**32
            assert float(value) == pytest.approx(
                math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second), abs=1e-6
            )


def test_noise_is_standard_normal_and_uncorrelated():
    """2^18 draws: a mean is off by 1/512 in one of three cases, so 4.5 of that in one of 150,000."""
    draws = normal(1, 2, 3, torch.arange(2**14), 16).double().numpy()
    unit = 1 / 512
    assert abs(draws.mean()) < 4.5 * unit
    assert abs(draws.var() - 1) < 4.5 * math.sqrt(2) * unit
    assert abs((draws**3).mean()) < 4.5 * math.sqrt(15) * unit
    assert abs((draws**4).mean() - 3) < 4.5 * math.sqrt(96) * unit
    # Kolmogorov-Smirnov: sqrt(n)·D is above 2 in one of 1,500 cases.
    from scipy.stats import kstest

    assert kstest(draws.ravel(), "norm").statistic * 512 < 2
    others = {
        "token": draws[1:] * draws[:-1],
        "expert": draws[:, 1:] * draws[:, :-1],
        "layer": draws * normal(1, 2, 4, torch.arange(2**14), 16).double().numpy(),
        "step": draws * normal(1, 3, 3, torch.arange(2**14), 16).double().numpy(),
        "seed": draws * normal(2, 2, 3, torch.arange(2**14), 16).double().numpy(),
    }
    for name, products in others.items():
        assert abs(products.mean()) < 4.5 / math.sqrt(products.size), name


def test_any_part_of_the_batch_draws_the_same():
    whole = normal(5, 6, 1, torch.arange(1000), 7)
    for first, last in ((0, 333), (333, 334), (334, 1000)):
        assert torch.equal(whole[first:last], normal(5, 6, 1, torch.arange(first, last), 7))
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[shuffled], normal(5, 6, 1, shuffled, 7))
