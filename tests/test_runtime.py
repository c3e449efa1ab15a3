"""Settings of a process for speed: only what was asked for, said, and put back; never by an import."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prismoe.doctor import doctor
from prismoe.errors import NumericalError
from prismoe.train.device import product_rate
from prismoe.train.metrics import read_metrics
from prismoe.train.runtime import Lever, levers, runtime
from prismoe.train.speed import Timing

GLIBC = platform.libc_ver()[0] == "glibc"
# In a process of its own, as our commands are: a heap that thousands of tests have cut up grows elsewhere.
PAGES = """
import json, resource, torch
from prismoe.train.runtime import kept_memory

def pages_taken(megabytes):
    # What the system had to give for a large tensor, at the least of ten: a small object that lands behind a freed
    # tensor makes its place too short for the next, so it takes some rounds until every size has found its own.
    least = 1 << 62
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(megabytes << 20, dtype=torch.uint8).fill_(1)
        least = min(least, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return least

usual = pages_taken(96)
with kept_memory(keep=True) as was_set:
    kept = pages_taken(96)
after = pages_taken(192)  # larger than any place that was left free
with kept_memory(keep=False) as not_set:
    asked_not = pages_taken(192)
print(json.dumps([usual, kept, after, asked_not, was_set, not_set]))
"""


@pytest.mark.skipif(not GLIBC, reason="only glibc can be told")
def test_kept_memory_is_used_again_and_given_back_afterwards() -> None:
    found = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    usual, kept, after, asked_not, was_set, not_set = json.loads(found.stdout)
    assert was_set
    assert kept < usual / 10
    assert after > usual / 2
    assert not not_set
    assert asked_not > usual / 2


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


@pytest.mark.parametrize(("bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_mfu_of_a_cpu_is_the_share_of_a_product_measured_in_this_process(tmp_path, bf16, dtype) -> None:
    settings = {"flops": 1e9, "world": 2, "device": torch.device("cpu"), "bf16": bf16}
    timing = Timing(tmp_path / "timing.jsonl", **settings, muted=False)
    timing.begin()
    line = timing.step(1, 1000)
    timing.close()
    assert line["peak_flops"] == round(product_rate(dtype)) > 1e8
    assert line["mfu"] == pytest.approx(line["tokens_per_second_device"] * 1e9 / line["peak_flops"], rel=1e-3)
    assert json.loads((tmp_path / "timing.jsonl").read_text()) == line
    muted = Timing(tmp_path / "muted.jsonl", **settings, muted=True)  # only one process measures
    assert "mfu" not in muted.step(1, 1000)
    muted.close()


def test_half_a_line_of_a_machine_that_went_down_is_not_written_behind(tmp_path: Path) -> None:
    path = tmp_path / "timing.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "seco')
    timing = Timing(path, flops=1e9, world=1, device=torch.device("cpu"), muted=False)
    timing.step(2, 1000)
    timing.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
