"""A base whose linear maps are kept in 4 or 8 bits, by bitsandbytes, while an adapter is trained.

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
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.logits import LogitTransform
from tunesmith.model.quantized_weight import parameter_count

_BLOCK = 64  # weights that share one scale in 4 bits
_SCALES = 256  # scales that share one scale where they are quantised too
# peft reads these names in a model with experts as the experts' own, and works on their weights
_FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the base is kept; `double`: the scales of 4 bits are quantised as well."""

    kind: str  # nf4, fp4 or int8
    double: bool = False

    def bytes(self, parameters: int, rows: int) -> int:
        """Bytes of so many weights in so many rows, scales among them."""
        if self.kind == "int8":
            return parameters + 4 * rows
        scales = -(-parameters // _BLOCK)
        kept = scales + 4 * -(-scales // _SCALES) if self.double else 4 * scales
        return -(-parameters // 2) + kept


def check_available(quantization: Quantization) -> None:
    """Raises:
    ModelError: what quantises is not installed.
    """
    for package in ("bitsandbytes", "accelerate"):
        if find_spec(package) is None:
            raise ModelError(
                f"{quantization.kind} needs the package {package}, which is not installed",
                where="model.quantization",
                hint="pip install 'tunesmith[quant]', or model.quantization=none",
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
    from transformers import BitsAndBytesConfig

    kept = _kept(config, trust_remote_code)
    four = quantization.kind in ("nf4", "fp4")
    options: dict[str, Any] = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if four:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": quantization.kind,
            "bnb_4bit_use_double_quant": quantization.double,
            "bnb_4bit_compute_dtype": dtype,
        }
    settings = BitsAndBytesConfig(llm_int8_skip_modules=kept, **options)
    return {"quantization_config": settings, "device_map": {"": str(device)}}


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
    from tunesmith.model.quantized_linear import multiply_dequantized

    modules = multiply_dequantized(causal_lm.base)
    parameters = {id(p): parameter_count(p) for p in causal_lm.base.parameters()}
    inside = sum(parameters[id(m.weight)] for m in modules)
    share = inside / sum(parameters.values())
    if not modules:
        raise ModelError(
            f"{causal_lm.config.model_type} has no linear map that can be quantised",
            where="model.quantization",
            hint="model.quantization=none",
        )
    text = f"{len(modules)} linear maps are kept as {quantization.kind}, {share:.0%} of the weights"
    if expert_counts(causal_lm.config):
        text += "; tensors of experts stay as they are"
    return text


def _kept(config: Any, trust_remote_code: bool) -> list[str]:
    """Names of all linear maps that are not quantised, found without a weight being read."""
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    wanted = set(quantizable(CausalLM(model, logits=LogitTransform())))
    linear = nn.Linear | Conv1D
    found = [name for name, module in model.named_modules() if isinstance(module, linear)]
    # a pattern of transformers matches whole names only with an end
    return [f"{name}$" for name in found if name not in wanted]
