"""Checkpoints as they are published, written from plain weights: MXFP4, FP8 and INT4.

Each function returns the parts of a tensor in the files, quantised by the format's own rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def mxfp4(name: str, weight: Tensor) -> dict[str, Tensor]:
    """Experts [E, C, R]: 32 inputs of a row share an exponent; two numbers a byte, lower first."""
    groups = weight.transpose(1, 2).float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1).clamp(min=1e-30)
    exponents = torch.floor(torch.log2(largest)) - 2  # 6 = 1.5 * 2**2 is the largest number
    scaled = groups / torch.exp2(exponents)[..., None]
    table = torch.tensor(E2M1)
    codes = (scaled.abs()[..., None] - table).abs().argmin(-1) + 8 * (scaled < 0)
    pairs = codes.to(torch.uint8).unflatten(-1, (16, 2))
    return {
        f"{name}_blocks": pairs[..., 0] | (pairs[..., 1] << 4),
        f"{name}_scales": (exponents + 127).to(torch.uint8),
    }


def fp8(name: str, weight: Tensor, *, block: int = 128) -> dict[str, Tensor]:
    """A matrix [R, C] with a factor for each block, the largest number being 448."""
    rows, columns = weight.shape
    factors = torch.empty(-(-rows // block), -(-columns // block))
    numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(factors.shape[0]):
        for j in range(factors.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            factors[i, j] = weight[part].abs().max().float() / 448
            numbers[part] = (weight[part].float() / factors[i, j]).to(torch.float8_e4m3fn)
    return {name: numbers, f"{name}_scale_inv": factors}


def int4(name: str, weight: Tensor, *, group: int = 32) -> dict[str, Tensor]:
    """A matrix [R, C]: symmetric, a factor for each `group` inputs; eight numbers an int32."""
    groups = weight.float().unflatten(-1, (-1, group))
    factors = (groups.abs().amax(-1) / 7).to(torch.bfloat16)
    numbers = (groups / factors.float()[..., None]).round().clamp(-8, 7).flatten(-2).int() + 8
    eights = numbers.unflatten(-1, (-1, 8)).long()
    packed = (eights << torch.arange(0, 32, 4)).sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    return {
        f"{name}_packed": packed,
        f"{name}_scale": factors,
        f"{name}_shape": torch.tensor(weight.shape),
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "fp8": {
        "quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    },
    "int4": {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
                    "group_size": 32,
                },
            }
        },
    },
}  # fmt: skip


def publish(
    folder: Path, kind: str, pack: Callable[[str, Tensor], dict[str, Tensor]],
    wanted: Callable[[str, Tensor], bool], **settings: Any,
) -> None:  # fmt: skip
    """Quantise the `wanted` tensors of a folder's files in place."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            tensors |= pack(name, tensor) if wanted(name, tensor) else {name: tensor}
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**SETTINGS[kind], **settings}
    (folder / "config.json").write_text(json.dumps(config))
