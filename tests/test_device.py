"""Process settings are put back, and a kernel that is not float32 is refused."""

import contextlib

import pytest
import torch

from prismoe.errors import NumericalError, ResourceError
from prismoe.room import available_memory, require_room
from prismoe.train.device import matmul_kernel, matmul_precision, num_threads, product_rate, seed_draws
from prismoe.train.experts import _compiled_by_size


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with num_threads(before + 2):
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before
    with num_threads(0):
        assert torch.get_num_threads() == before


def test_the_fast_kernel_computes_in_float32_or_is_refused():
    before = torch.get_float32_matmul_precision()
    # On a machine whose fast kernel is bfloat16 the refusal is the right answer.
    with contextlib.suppress(NumericalError), matmul_kernel(fast=True):
        assert torch.get_float32_matmul_precision() == "medium"
        left, right = torch.randn(300, 200), torch.randn(200, 100)
        exact = left.double() @ right.double()
        assert (left @ right - exact).norm() / exact.norm() < 1e-5
    assert torch.get_float32_matmul_precision() == before
    with matmul_kernel(fast=False):
        assert torch.get_float32_matmul_precision() == before


def test_a_kernel_in_bfloat16_is_caught():
    before = torch.get_float32_matmul_precision()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(NumericalError, match=r"fast_matmul: float32 matrix products are off by \d\.\de-03") as caught,
        matmul_kernel(fast=True),
    ):
        pass
    assert caught.value.exit_code == 5
    assert torch.get_float32_matmul_precision() == before


def test_the_newer_switches_of_torch_are_left_as_they_are():
    kinds = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [kind.fp32_precision for kind in kinds]
    try:
        kinds[0].fp32_precision = "bf16"
        assert matmul_precision() is None
        assert product_rate(torch.float32) > 0
        assert not _compiled_by_size(torch.ones(2, 2))
        with contextlib.suppress(NumericalError), matmul_kernel(fast=True):
            assert matmul_precision() == "medium"
        assert matmul_precision() is None
        assert [kind.fp32_precision for kind in kinds] == ["bf16", before[1]]
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision
    assert matmul_precision() == "highest"


def test_room(tmp_path):
    out = tmp_path / "not" / "there"
    require_room(out, disk_bytes=1, memory_bytes=1)
    with pytest.raises(ResourceError, match=r"there: .* of disk free; needed 1000000000\.0 GB \(hint: less\)"):
        require_room(out, disk_bytes=10**18, memory_bytes=1, hint="less")
    if available_memory() is not None:
        with pytest.raises(ResourceError, match=r"of memory available; needed about 1000000000\.0 GB"):
            require_room(out, disk_bytes=1, memory_bytes=10**18)
    assert not out.exists()


def test_seeded_draws_are_those_of_torch():
    for seed in (0, 7, 2**63 - 1):
        torch.manual_seed(seed)
        wanted = torch.randn(5)
        seed_draws(seed, torch.device("cpu"))
        assert torch.equal(torch.randn(5), wanted)
        assert torch.initial_seed() == seed
