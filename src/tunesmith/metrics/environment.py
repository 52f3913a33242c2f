"""Machine and package versions of a run, for machine.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import tunesmith
from tunesmith.redact import redact

PACKAGES = ("torch", "transformers", "peft", "safetensors", "numpy", "pyarrow", "tokenizers")
"""Packages whose versions are recorded."""


def machine_record() -> dict[str, Any]:
    """The machine of a run: versions, platform, CPU, threads, GPUs and the command line."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": _gpus(),
        "cuda": torch.version.cuda,
        "command": [redact(word) for word in sys.argv],
    }


def versions() -> dict[str, str]:
    """Versions of Python, Tunesmith and the packages a result depends on."""
    found = {"python": platform.python_version(), "tunesmith": tunesmith.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = str(torch.__version__)  # includes the build (+cpu), which metadata may lack
    return found


def cpu_name() -> str:
    """The name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory": gpu.total_memory} for gpu in found]
