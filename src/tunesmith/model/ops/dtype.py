"""The compute dtype: bfloat16 where a device multiplies it in hardware, else float32."""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import ModelError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class DtypeChoice:
    """The dtype of the forward and backward pass, and why it was taken."""

    dtype: torch.dtype
    reason: str

    @property
    def note(self) -> str:
        """The choice in words."""
        return f"dtype {str(self.dtype).removeprefix('torch.')}: {self.reason}"


def choose_dtype(dtype: str | torch.dtype, device: torch.device | str) -> DtypeChoice:
    """`auto` is bfloat16 where the device multiplies it in hardware, else float32."""
    if isinstance(dtype, torch.dtype):
        return DtypeChoice(dtype, "as asked")
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(
                f"unknown dtype {dtype!r}", where="model.dtype", hint="auto, bfloat16 or float32"
            )
        return DtypeChoice(_DTYPES[dtype], "as asked")
    kind = torch.device(device).type
    if kind == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return DtypeChoice(torch.bfloat16, "the GPU multiplies bfloat16 in hardware")
        return DtypeChoice(torch.float32, "the GPU has no bfloat16 in hardware")
    if kind == "cpu":
        fast = cpu_bfloat16()
        if fast:
            return DtypeChoice(torch.bfloat16, f"the CPU multiplies bfloat16 in hardware ({fast})")
        return DtypeChoice(torch.float32, "the CPU has no bfloat16 in hardware")
    return DtypeChoice(torch.float32, f"bfloat16 is not known to be fast on {kind}")


@functools.cache
def cpu_bfloat16() -> str | None:
    """Name of the instruction set with which this CPU multiplies bfloat16 matrices, None if it has
    none.
    """
    read = getattr(torch.cpu, "get_capabilities", dict)
    capabilities: dict[str, Any] = read()
    known = {
        "amx_bf16": "AMX",
        "amx_tile": "AMX",
        "avx512_bf16": "AVX512-BF16",
        "arm_bf16": "Arm BF16",
        "bf16": "Arm BF16",
    }
    for key, label in known.items():
        if capabilities.get(key):
            return label
    if platform.system() == "Linux":
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        flags = {
            word
            for line in text.splitlines()
            if line.startswith(("flags", "Features"))
            for word in line.split()
        }
        return next((label for key, label in known.items() if key in flags), None)
    return None
