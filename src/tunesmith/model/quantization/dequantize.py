"""Dequantisation of published checkpoints: MXFP4 (OCP Microscaling Formats 1.0), FP8 with block
scales (DeepSeek-V3, arXiv 2412.19437, section 3.3), and INT4 packed by compressed-tensors.

Each tensor that is not a plain one has several parts in the files. Here they become one bfloat16
tensor, under the name that an unquantised checkpoint of the same model gives it.

Letters: R rows (outputs), C columns (inputs), E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError

_FORMATS = {"pack-quantized": "INT4", "float-quantized": "FP8"}
"""Formats of compressed-tensors that are read here."""
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of a 4-bit float with 2 bits of exponent; the highest bit is the sign."""
_E8M0_BIAS = 127
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""Names that publishers give to the factors of an FP8 weight."""
_ACTIVATIONS = ("activation_scale", "input_scale", "qscale_act", "input_global_scale")
"""Factors of activations, which nothing needs once weights are plain."""

Read = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor with several parts in the files, which are named here by what they are."""

    method: str
    parts: Mapping[str, str]
    block: tuple[int, int] = (128, 128)  # rows and columns that share an FP8 factor

    @property
    def main(self) -> str:
        """The part that holds most of it; the plain tensor goes into the same file."""
        return next(iter(self.parts.values()))

    def tensor(self, read: Read) -> Tensor:
        """The tensor in bfloat16."""
        held = {kind: read(name) for kind, name in self.parts.items()}
        if self.method == "fp8":
            return dequantize_fp8(**held, block=self.block)
        return dequantize_mxfp4(**held) if self.method == "mxfp4" else dequantize_int4(**held)

    def shape(self, shape_of: Callable[[str], tuple[int, ...]], read: Read) -> tuple[int, ...]:
        """The shape of the tensor, without reading its weights."""
        shape = shape_of(self.main)
        if self.method == "mxfp4":
            *experts, rows, groups, half = shape
            return (*experts, groups * half * 2, rows)
        if self.method == "int4":
            return tuple(int(size) for size in read(self.parts["shape"]).tolist())
        return shape


def quant_method(config: Mapping[str, Any]) -> str | None:
    """The quantisation that a model's config.json names; None for plain weights."""
    found = _settings(config)
    if not found:
        return None
    return str(found.get("quant_method") or found.get("quantization_method") or "unknown")


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The quantisation config, which a multimodal model may keep in that of its text part."""
    text: Any = config.get("text_config")
    for held in (config, text):
        found: Any = held.get("quantization_config") if isinstance(held, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return {}


def check_readable(config: Mapping[str, Any], where: str) -> str | None:
    """The quantisation of a model's files, in words; None for plain weights.

    Raises:
        ModelError: one that is not read here.
    """
    method = quant_method(config)
    if method is None:
        return None
    settings = _settings(config)
    kind = {"mxfp4": "MXFP4", "fp8": "FP8"}.get(method)
    if method == "compressed-tensors":
        kind = _FORMATS.get(str(settings.get("format")))
        bits = {group.get("weights", {}).get("num_bits") for group in _groups(settings)}
        if kind == "INT4" and bits != {4}:
            kind = None
    if kind is None:
        named = " ".join(str(part) for part in (method, settings.get("format")) if part)
        raise ModelError(
            f"its weights are quantised by {named}, which is not read here",
            where=where,
            hint="give the unquantised model, or one in MXFP4, FP8 or INT4 of compressed-tensors; "
            "model.quantization=nf4 quantises it while it is read",
        )
    return kind


def _groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [g for g in (settings.get("config_groups") or {}).values() if isinstance(g, Mapping)]


def find_packed(names: Collection[str], config: Mapping[str, Any]) -> dict[str, Packed | None]:
    """The plain names of all tensors in the files of a model with this config.json, each with what
    it is packed as; None for a tensor that lies in the files as it is.
    """
    stated: Any = _settings(config).get("weight_block_size") or (128, 128)
    packed = dict(_find(names, (int(stated[0]), int(stated[1]))))
    used = {part for one in packed.values() for part in one.parts.values()}
    plain = (n for n in names if n not in used and not n.endswith(_ACTIVATIONS))
    return {**dict.fromkeys(plain), **packed}


def _find(names: Collection[str], block: tuple[int, int]) -> Iterator[tuple[str, Packed]]:
    for name in names:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            if f"{stem}_scales" in names:
                yield stem, Packed("mxfp4", {"blocks": name, "scales": f"{stem}_scales"})
        elif name.endswith(".weight_packed"):
            stem = name.removesuffix("_packed")  # up to and with .weight
            parts = {"packed": name, "scale": f"{stem}_scale", "shape": f"{stem}_shape"}
            if f"{stem}_zero_point" in names:
                parts["zero_point"] = f"{stem}_zero_point"
            yield stem, Packed("int4", parts)
        elif name.endswith(".weight"):
            stem = name.removesuffix("weight")
            scale = next((stem + kind for kind in _SCALES if stem + kind in names), None)
            if scale is not None:
                yield name, Packed("fp8", {"weight": name, "scale": scale}, block)


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Experts [E, C, R] from `blocks` [E, R, C / 32, 16], two numbers a byte with the lower bits
    first, and `scales` [E, R, C / 32], exponents of 2 with bias 127.

    gpt-oss keeps the rows of a block along the inputs and multiplies from the right, so the last
    two dimensions are exchanged.
    """
    magnitudes = torch.tensor(_E2M1)
    values = torch.cat([magnitudes, -magnitudes]).to(torch.bfloat16)
    codes = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)  # [E, R, C / 32, 32]
    exponents = scales.to(torch.int32)[..., None] - _E8M0_BIAS
    plain = torch.ldexp(values[codes.int()], exponents)
    return plain.flatten(-2).transpose(-1, -2).contiguous()


def dequantize_fp8(weight: Tensor, scale: Tensor, *, block: tuple[int, int] = (128, 128)) -> Tensor:
    """[R, C] from FP8 numbers [R, C] and `scale`: the factor of the whole, of each row [R, 1], or
    of each block [R / b, C / b]; the last block of a dimension may be smaller.
    """
    if weight.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
        raise ModelError(f"a weight with FP8 scales is {weight.dtype}, which is not read here")
    factors = _e8m0(scale).float()
    if factors.ndim < 2:
        factors = factors.reshape(-1, 1)
    for dim, length in zip((-2, -1), block, strict=True):
        size, blocks = weight.shape[dim], factors.shape[dim]
        if -(-size // length) != blocks:  # not the stated blocks: equal ones, such as whole rows
            length = -(-size // blocks)
        factors = factors.repeat_interleave(length, dim).narrow(dim, 0, size)
    return (weight.float() * factors).to(torch.bfloat16)


def _e8m0(scale: Tensor) -> Tensor:
    """Factors that are stored as exponents of 2 in a byte, as numbers."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones(()), scale.to(torch.int32) - _E8M0_BIAS)
    return scale


def dequantize_int4(
    packed: Tensor, scale: Tensor, shape: Tensor, zero_point: Tensor | None = None
) -> Tensor:
    """[R, C] from `packed` int32 [R, C / 8], eight numbers each with the lowest bits first and
    offset by 8, `scale` [R, C / group] or [R, 1], and zero points packed along the rows.
    """
    rows, columns = (int(size) for size in shape.tolist())
    numbers = _unpack(packed)[:, :columns] - 8
    groups = scale.shape[1]
    if zero_point is not None:
        offsets = _unpack(zero_point.T.contiguous()).T[:rows] - 8
        numbers = numbers - offsets.repeat_interleave(columns // groups, 1)
    factors = scale.float().repeat_interleave(columns // groups, 1)
    return (numbers.float() * factors).to(torch.bfloat16)


def _unpack(packed: Tensor) -> Tensor:
    """[R, 8 n] numbers of 4 bits from int32 [R, n]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & 0xF).flatten(-2)
