"""Quantised bases for adapter training (QLoRA, arXiv 2305.14314), with bitsandbytes or torchao.

Quantised are the decoder's linear maps that an adapter could go on. Embedding, head, norms, routers
and tensors that hold a layer's experts stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tunesmith.errors import ModelError
from tunesmith.model.adapters.targets import candidates, expert_counts
from tunesmith.model.architecture import empty_model
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import LogitTransform
from tunesmith.model.ops.packed_weight import quantized_share

_BLOCK = 64  # weights that share one scale in 4 bits
_GROUP = 32  # the same in torchao's 4 bits
_SCALES = 256  # scales that share one scale where they are quantised too
# peft reads these names in a model with experts as the experts' own, and works on their weights
_FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the base is kept; `double`: the scales of 4 bits are quantised as well."""

    kind: str  # nf4, fp4, int8; torchao_int8, torchao_fp8, torchao_int4
    double: bool = False

    @property
    def library(self) -> str:
        """The package that quantises."""
        return "torchao" if self.kind.startswith("torchao_") else "bitsandbytes"

    def bytes(self, parameters: int, rows: int, *, width: int = 4) -> int:
        """Bytes of so many weights in so many rows, scales among them; `width`: bytes of a weight
        that is not quantised.
        """
        each = {"int8": 4, "torchao_int8": 5, "torchao_fp8": 4}  # of a row; 5 with a zero point
        if self.kind in each:
            return parameters + each[self.kind] * rows
        if self.kind == "torchao_int4":
            return -(-parameters // 2) + width * (parameters // _GROUP)
        scales = -(-parameters // _BLOCK)
        kept = scales + 4 * -(-scales // _SCALES) if self.double else 4 * scales
        return -(-parameters // 2) + kept


def check_available(quantization: Quantization) -> None:
    """Raises:
    ModelError: what quantises is not installed.
    """
    extra = {"bitsandbytes": "quant", "torchao": "torchao"}[quantization.library]
    for package in (quantization.library, "accelerate"):
        if find_spec(package) is None:
            raise ModelError(
                f"{quantization.kind} needs the package {package}, which is not installed",
                where="model.quantization",
                hint=f"pip install 'tunesmith[{extra}]', or model.quantization=none",
            )


def loading_options(
    quantization: Quantization,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Options with which `from_pretrained` quantises each weight as it is read.

    Raises:
        ModelError: the packages are missing, or the model has nothing to quantise.
    """
    check_available(quantization)
    found = _linear_maps(config, trust_remote_code)
    kept = [name for name, width in found.items() if width is None]
    if quantization.library == "torchao":
        widths = {name: width for name, width in found.items() if width is not None}
        settings = _torchao(quantization.kind, device, widths=widths, kept=kept)
    else:
        settings = _bitsandbytes(quantization, dtype, kept)
    return {"quantization_config": settings, "device_map": {"": str(device)}}


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype, kept: list[str]) -> Any:
    from transformers import BitsAndBytesConfig

    four = quantization.kind in ("nf4", "fp4")
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if four:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.kind,
            "bnb_4bit_use_double_quant": quantization.double,
            "bnb_4bit_compute_dtype": dtype,
        }
    # a pattern of transformers matches whole names only with an end
    return BitsAndBytesConfig(llm_int8_skip_modules=[f"{name}$" for name in kept], **options)


def _torchao(kind: str, device: torch.device, *, widths: dict[str, int], kept: list[str]) -> Any:
    from transformers import TorchAoConfig

    from tunesmith.model.quantization import torchao as quantized_torchao

    quantized_torchao.check_device(kind, device)
    quantized_torchao.check_widths(kind, widths)
    # here the patterns are held against names of weights
    skipped = [f"{name}.weight$" for name in kept]
    return TorchAoConfig(quantized_torchao.settings(kind), modules_to_not_convert=skipped)


def quantizable(causal_lm: CausalLM) -> list[str]:
    """Names of the linear maps that are quantised."""
    linear = candidates(causal_lm).linear
    if not expert_counts(causal_lm.config):
        return list(linear)
    return [name for name in linear if name.rsplit(".", 1)[-1] not in _FUSED]


def finish_loading(causal_lm: CausalLM, quantization: Quantization) -> str:
    """Let the quantised maps multiply as training needs it; returns what is to be said of them.

    Raises:
        ModelError: nothing was quantised.
    """
    if quantization.library == "torchao":
        from tunesmith.model.quantization.torchao import multiply_dequantized
    else:
        from tunesmith.model.quantization.bnb import multiply_dequantized

    modules = multiply_dequantized(causal_lm.base)
    if not modules:
        raise ModelError(
            f"{causal_lm.config.model_type} has no linear map that can be quantised",
            where="model.quantization",
            hint="model.quantization=none",
        )
    share = quantized_share(causal_lm.base)
    text = f"{len(modules)} linear maps are kept as {quantization.kind}, {share:.0%} of the weights"
    if expert_counts(causal_lm.config):
        text += "; tensors of experts stay as they are"
    return text


def _linear_maps(config: Any, trust_remote_code: bool) -> dict[str, int | None]:
    """All linear maps by name, with the width of their input; None: not to be quantised. No weight
    is read.
    """
    from transformers.pytorch_utils import Conv1D

    name = str(getattr(config, "_name_or_path", "") or "model")
    model = empty_model(config, name, trust_remote_code=trust_remote_code)
    wanted = set(quantizable(CausalLM(model, logits=LogitTransform())))
    return {
        name: module.weight.shape[-1] if name in wanted else None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
