"""The metadata header of a GGUF file; a model that it can't describe is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunesmith.errors import ModelError

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3": "gemma3",
}
"""transformers' model_type and what the runtimes of .gguf files call it."""
_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA_PERIOD = {"gemma2": 2, "gemma3": 6}  # every n-th layer sees everything
_GEMMA_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the one size with its own scale
_GEMMA3_LOCAL_BASE = 10000.0
_PLAIN = ("rope_theta", "rope_type", "partial_rotary_factor")


@dataclass(frozen=True, slots=True)
class Header:
    """The architecture's name, its fields without that prefix, and factors of RoPE frequencies."""

    architecture: str
    fields: dict[str, int | float | str]
    rope_factors: np.ndarray | None = None  # [head_dim / 2], float32

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key-value heads."""
        return int(self.fields["attention.head_count"]), int(self.fields["attention.head_count_kv"])


def read_header(config: Any) -> Header:
    """The header of a model with this transformers config.

    Raises:
        ModelError: another family, or a setting that runtimes of .gguf files would not follow.
    """
    family = ARCHITECTURES.get(config.model_type)
    if family is None:
        known = ", ".join(name for name in ARCHITECTURES if name != "gemma3_text")
        raise ModelError(
            f"{config.model_type} can't be written as .gguf here; {known} can",
            hint="--to hf writes a folder that other converters read",
        )
    text = config.get_text_config()
    _check_activation(text, family)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rope, local = _rope(text)
    fields: dict[str, int | float | str] = {
        "context_length": text.max_position_embeddings,
        "block_count": text.num_hidden_layers,
        "embedding_length": text.hidden_size,
        "feed_forward_length": text.intermediate_size,
        "attention.head_count": text.num_attention_heads,
        "attention.head_count_kv": text.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(text.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    factors = _scaling(fields, rope, head_dim)
    if family in _GEMMA_PERIOD:
        _add_gemma(fields, text, local, family)
    else:
        _limit_to_window(fields, text)
    return Header(family, fields, factors)


def _check_activation(text: Any, family: str) -> None:
    found = getattr(text, "hidden_activation", None) or text.hidden_act
    wanted = "gelu_pytorch_tanh" if family in _GEMMA_PERIOD else "silu"
    if found != wanted:
        raise _refusal(f"activation {found!r}, {family} means {wanted!r}")


def _rope(text: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parameters of the full layers, and those of the sliding ones where they differ."""
    rope = dict(text.rope_parameters)
    if _FULL in rope:
        return dict(rope[_FULL]), dict(rope[_SLIDING])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refusal("RoPE on a part of the head")
    return rope, None


def _scaling(
    fields: dict[str, int | float | str], rope: dict[str, Any], head_dim: int
) -> np.ndarray | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind == "llama3":
        return _llama3_factors(rope, head_dim)
    if kind == "linear" or (kind == "yarn" and not set(rope) - _YARN_KNOWN):
        fields["rope.scaling.type"] = kind
        fields["rope.scaling.factor"] = float(rope["factor"])
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings")
            if not original:
                raise _refusal("yarn RoPE without original_max_position_embeddings")
            fields["rope.scaling.original_context_length"] = int(original)
        return None
    raise _refusal(f"RoPE scaling {kind!r} with {', '.join(sorted(set(rope) - set(_PLAIN)))}")


_YARN_KNOWN = {*_PLAIN, "factor", "original_max_position_embeddings"}


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    """By how much each frequency is divided: 1 for short waves, `factor` for long ones, between
    them harmonically mixed.
    """
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original, factor = int(rope["original_max_position_embeddings"]), float(rope["factor"])
    result: list[float] = []
    for i in range(head_dim // 2):
        turns = original / (2 * math.pi * float(rope["rope_theta"]) ** (2 * i / head_dim))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        result.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(result, dtype=np.float32)


def _add_gemma(
    fields: dict[str, int | float | str], text: Any, local: dict[str, Any] | None, family: str
) -> None:
    period, layers = _GEMMA_PERIOD[family], text.num_hidden_layers
    expected = [_FULL if (i + 1) % period == 0 else _SLIDING for i in range(layers)]
    if list(text.layer_types) != expected:
        raise _refusal(f"{family} whose full layers are not every {period}th")
    scale = text.hidden_size // text.num_attention_heads
    if layers != _GEMMA_LARGEST[family]:
        scale = int(fields["attention.key_length"])
    if text.query_pre_attn_scalar != scale:
        raise _refusal(
            f"query_pre_attn_scalar {text.query_pre_attn_scalar}, {family} means {scale}"
        )
    fields["attention.sliding_window"] = int(text.sliding_window)
    attention, final = text.attn_logit_softcapping, text.final_logit_softcapping
    if family == "gemma2":
        fields["attn_logit_softcapping"] = float(attention or 0)
        fields["final_logit_softcapping"] = float(final or 0)
        if not attention or not final:
            raise _refusal("gemma2 without soft caps")
        return
    if attention or final:
        raise _refusal("gemma3 with soft caps")
    local = local or {}
    if local.get("rope_theta") != _GEMMA3_LOCAL_BASE or local.get("rope_type") != "default":
        raise _refusal("gemma3 whose sliding layers have another RoPE than base 10000")


def _limit_to_window(fields: dict[str, int | float | str], text: Any) -> None:
    """The file promises no longer context than the window, up to which both compute the same."""
    sliding = _SLIDING in (getattr(text, "layer_types", None) or [])
    used = getattr(text, "use_sliding_window", True) or sliding
    window = getattr(text, "sliding_window", None)
    if window and used:
        fields["context_length"] = min(int(fields["context_length"]), int(window))


def _refusal(what: str) -> ModelError:
    return ModelError(
        f"a .gguf file can't hold this model: {what}",
        hint="--to hf writes a folder as it is",
    )
