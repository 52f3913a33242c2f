"""Config files for old and new readers: keys that transformers 4 and 5 spell differently.

Readers of the time before transformers 5 look for `rope_theta`, `rope_scaling`, `torch_dtype`, for
a tokenizer class they know and for the template inside `tokenizer_config.json`; what they don't
find they replace in silence. Here such keys are put next to the new ones. Nothing is removed but
what is no longer true.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_FULL, _SLIDING = "full_attention", "sliding_attention"
_NEOX = ("gpt_neox", "gpt_neox_japanese")
_NOT_SCALING = ("rope_theta", "partial_rotary_factor")
_KNOWN_SCALING = ("linear", "dynamic", "yarn", "longrope", "llama3")
"""What readers of that time know. Other kinds came with `rope_parameters`, and a reader that knows
them would take the older key for the whole.
"""


def complete_config(config: Mapping[str, Any], *, dtype: str, quantized: bool) -> dict[str, Any]:
    """config.json with the dtype of the weights beside it and the rope keys of older readers.

    A `quantization_config` goes where the weights are plain now, as after training on a dequantised
    model.
    """
    result = dict(config)
    if not quantized:
        result.pop("quantization_config", None)
    _set_dtype(result, dtype)
    _add_rope(result)
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, Mapping) and "rope_parameters" in part:
            nested = dict(part)
            _add_rope(nested)
            result[name] = nested
    return result


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    text = config.get("text_config")
    if isinstance(text, Mapping) and ("dtype" in text or "torch_dtype" in text):
        config["text_config"] = {**text, "dtype": dtype, "torch_dtype": dtype}
    if config.get("dtype", dtype) != dtype:
        config["dtype"] = dtype
    config["torch_dtype"] = dtype


def _add_rope(config: dict[str, Any]) -> None:
    """Old rope keys from `rope_parameters`; a key that is there already stays."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return
    main = rope
    if _FULL in rope or _SLIDING in rope:
        main = rope.get(_FULL) or rope[_SLIDING]
        sliding = rope.get(_SLIDING) or {}
        if "rope_theta" in sliding:
            config.setdefault("rope_local_base_freq", sliding["rope_theta"])
    if "rope_theta" in main:
        config.setdefault("rope_theta", main["rope_theta"])
    scaling = {key: value for key, value in main.items() if key not in _NOT_SCALING}
    kind = scaling.get("rope_type", "default")
    if kind == "default" or kind in _KNOWN_SCALING:
        config.setdefault("rope_scaling", None if kind == "default" else scaling)
    if "partial_rotary_factor" in main:
        config.setdefault("partial_rotary_factor", main["partial_rotary_factor"])
    if config.get("model_type") in _NEOX:
        config.setdefault("rotary_emb_base", main.get("rope_theta", 10000))
        config.setdefault("rotary_pct", main.get("partial_rotary_factor", 0.25))


def complete_tokenizer_config(config: Mapping[str, Any], template: str | None) -> dict[str, Any]:
    """tokenizer_config.json that older readers take too, with the chat template inside."""
    result = dict(config)
    if result.get("tokenizer_class") == "TokenizersBackend":
        result["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = result.get("extra_special_tokens")
    if isinstance(extra, list):
        # Before version 5 this key held a mapping of names, and the list had the other key.
        del result["extra_special_tokens"]
        result.setdefault("additional_special_tokens", extra)
    if template is not None and not _holds(result.get("chat_template"), template):
        result["chat_template"] = template
    return result


def _holds(found: Any, template: str) -> bool:
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found}
        return named.get("default") == template
    return found == template


def complete_generation_config(
    config: Mapping[str, Any] | None, model_config: Mapping[str, Any], stop_ids: Iterable[int]
) -> dict[str, Any]:
    """generation_config.json that ends an answer at every stop id.

    Without one readers take the ids of config.json, so a new one begins with those.
    """
    if config is None:
        text = model_config.get("text_config") or {}
        config = {
            key: model_config.get(key, text.get(key))
            for key in ("bos_token_id", "eos_token_id", "pad_token_id")
            if model_config.get(key, text.get(key)) is not None
        }
    eos = config.get("eos_token_id")
    known = [] if eos is None else list(eos) if isinstance(eos, list) else [eos]
    missing = sorted(set(stop_ids) - set(known))
    if not missing:
        return dict(config)
    ids = known + missing
    return {**config, "eos_token_id": ids[0] if len(ids) == 1 else ids}
