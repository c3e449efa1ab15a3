"""Settings of a process for speed: only what was asked for, said, and put back; never by an import."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import sys

import pytest
import torch

from prismoe.doctor import doctor
from prismoe.errors import NumericalError
from prismoe.train.runtime import Lever, kept_memory, levers, runtime

GLIBC = platform.libc_ver()[0] == "glibc"
LARGE = 96 << 20


def pages_taken() -> int:
    """Pages that the system had to give for a large tensor, the second one of its size."""
    torch.empty(LARGE, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(LARGE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not GLIBC, reason="only glibc can be told")
def test_kept_memory_is_used_again_and_given_back_afterwards() -> None:
    usual = pages_taken()
    with kept_memory(keep=True) as kept:
        assert kept
        assert pages_taken() < usual / 10
    assert pages_taken() > usual / 2
    with kept_memory(keep=False) as kept:
        assert not kept
        assert pages_taken() > usual / 2


def test_only_what_was_asked_for_is_set_and_said() -> None:
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    with runtime() as found:
        assert found == {"fast_matmul": False, "keep_memory": False}
        assert torch.get_float32_matmul_precision() == precision
    with (
        contextlib.suppress(NumericalError),  # on a machine whose fast product is bfloat16
        runtime(threads=threads + 1, fast_matmul=True, keep_memory=True) as found,
    ):
        assert found == {"fast_matmul": True, "keep_memory": GLIBC}
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_num_threads() == threads + 1
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (threads, precision)


def test_no_import_sets_anything() -> None:
    code = """
import resource, torch
def state():
    return torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.mkldnn.enabled
def pages():
    torch.empty(96 << 20, dtype=torch.uint8).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(96 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before, taken = state(), pages()
import prismoe, prismoe.cli, prismoe.train.runtime, prismoe.train.experts, prismoe.train.loop, prismoe.train.pretrain
assert state() == before, (state(), before)
assert pages() > taken / 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_lever_says_whether_it_helps() -> None:
    assert str(Lever("a.b", 1.0, 2.0, "GB/s")) == "a.b=true would help: 1.0 to 2.0 GB/s"
    assert str(Lever("a.b", 1.0, 1.05, "GB/s", "off by 1e-07")).startswith("a.b=true would not help")
    inexact = Lever("a.b", 1.0, 9.0, "GB/s", "off", allowed=False)
    assert "must not be used" in str(inexact)
    assert not inexact.helps


def test_the_doctor_shows_both_and_leaves_the_process_as_it_was() -> None:
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    facts = doctor().sections["torch"]
    assert facts["fast_matmul"].startswith("pretrain.fast_matmul=true ")
    assert facts["keep_memory"].startswith("pretrain.keep_memory=true ")
    assert (torch.get_float32_matmul_precision(), torch.get_num_threads()) == before
    assert [lever.setting for lever in levers()] == ["pretrain.fast_matmul", "pretrain.keep_memory"]
    assert all(lever.before > 0 and lever.after > 0 for lever in levers())


def test_a_product_in_bfloat16_must_not_be_used() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        lever = levers()[0]
    assert not lever.allowed
    assert "must not be used" in str(lever)
