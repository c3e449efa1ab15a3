"""A picture of the machine and the versions, ready to paste into a report: no host name, no user, no path."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["VARIABLES", "Picture", "doctor", "system"]

PACKAGES = [
    "prismoe",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "ml_dtypes",
    "pydantic",
    "PyYAML",
    "rich",
    "zstandard",
    "jinja2",
    "matplotlib",
]
VARIABLES = [
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "PYTORCH_ALLOC_CONF",
    "NO_COLOR",
]
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
LITTLE_MEMORY = 4_000_000_000  # bytes; below this even a one-layer certificate of a 70B model does not fit
LITTLE_DISK = 10_000_000_000


@dataclass(frozen=True)
class Picture:
    """Named facts in named sections, and what a person should look at first."""

    sections: dict[str, dict[str, str]]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"sections": self.sections, "warnings": list(self.warnings)}


def doctor() -> Picture:
    """Look at the machine. Imports torch; a part that cannot be read says so instead of failing."""
    warnings: list[str] = []
    sections = {
        "system": _system(warnings),
        "torch": _torch(warnings),
        "packages": {name: _version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ} or {"(none set)": ""},
    }
    return Picture(sections, tuple(warnings))


def system() -> dict[str, str]:
    """The part of the picture that needs no torch: processor, memory, disk, Python."""
    return _system([])


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of memory for this process: the machine's, or a control group's where that is less."""
    info = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            info[name] = int(rest.split()[0]) * 1024
        total, available = info["MemTotal"], info["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return 0, 0
        available = total
    limit = _number("/sys/fs/cgroup/memory.max")
    if limit is not None and limit < total:
        total, available = limit, min(available, limit - (_number("/sys/fs/cgroup/memory.current") or 0))
    return total, available


def _system(warnings: list[str]) -> dict[str, str]:
    total, available = memory_bytes()
    if 0 < available < LITTLE_MEMORY:
        warnings.append(f"{available / 1e9:.1f} GB of memory available: loading a model may fail")
    free = {name: shutil.disk_usage(path).free for name, path in (("here", "."), ("temporary", tempfile.gettempdir()))}
    if free["here"] < LITTLE_DISK:
        warnings.append(f"{free['here'] / 1e9:.1f} GB of disk free in this folder")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}, {sys.maxsize.bit_length() + 1} bit",
        "system": f"{platform.system()} {_release()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()) or "unknown",
        "cpu": cpu_name(),
        "cores": f"{cores} usable of {os.cpu_count()}",
        "memory": f"{available / 1e9:.1f} GB available of {total / 1e9:.1f} GB" if total else "unknown",
        "disk free": f"{free['here'] / 1e9:.1f} GB here, {free['temporary'] / 1e9:.1f} GB temporary",
        "in-kernel copy": "yes" if hasattr(os, "copy_file_range") else "no (convert falls back to read and write)",
    }


def _release() -> str:
    """The kernel's version; what a distribution or a host adds behind it may name the place."""
    return ".".join(platform.release().split("-")[0].split(".")[:2])


def cpu_name() -> str:
    """The processor and those of its extensions that matter here."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or "unknown"
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    flags = [flag for flag in CPU_FLAGS if found and flag in found[1].split()]
    return f"{name[1] if name else platform.machine()} [{' '.join(flags)}]"


def _torch(warnings: list[str]) -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a broken shared library is an OSError
        warnings.append(f"torch cannot be imported ({error}): convert and plan work, verify and pretrain do not")
        return {"torch": f"cannot be imported: {error}"}
    facts = {"threads": str(torch.get_num_threads()), "cpu capability": torch.backends.cpu.get_cpu_capability()}
    if torch.get_num_threads() > 1 and os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        warnings.append("OMP_WAIT_POLICY=passive is not set: waiting threads spin, which slows small models")
    for index in range(torch.cuda.device_count()):
        facts[f"cuda:{index}"] = _cuda(torch, index)
    facts.setdefault("accelerator", "see above" if torch.cuda.device_count() else "none")
    from prismoe.train.runtime import levers

    for lever in levers():
        facts[lever.setting.removeprefix("pretrain.")] = str(lever)
    if torch.backends.mps.is_available():
        facts["accelerator"] = "mps"
    return facts


def _cuda(torch: Any, index: int) -> str:
    facts = torch.cuda.get_device_properties(index)
    return f"{facts.name}, {facts.total_memory / 1e9:.0f} GB, {facts.major}.{facts.minor}, CUDA {torch.version.cuda}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):  # absent, or the word "max"
        return None
