"""Tiny configurations of nearly any family of transformers: the defaults of its configuration class
with every width, depth and count made small, and corrections by hand for a few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING

HIDDEN, FEED, VOCABULARY = 64, 96, 448
_TEXT_NAMES: dict[Any, str] = {
    HIDDEN: """hidden_size d_model n_embd embed_dim dim model_dim embedding_size
        word_embed_proj_dim attention_hidden_size lru_width conv_dim""",
    FEED: """intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        intermediate_size_mlp dense_intermediate_size block_ff_dim shared_intermediate_size n_inner
        ffn_inner_dim""",
    4: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads
        swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts
        num_routed_experts linear_num_value_heads linear_num_heads""",
    2: """num_key_value_heads swa_num_key_value_heads multi_query_group_num num_experts_per_tok
        moe_topk top_k_experts moe_k num_experts_per_token experts_per_token linear_num_key_heads
        mamba_expand n_mamba_heads index_n_heads altup_num_inputs num_meta_tokens""",
    16: """head_dim swa_head_dim swa_v_head_dim attention_head_dim global_head_dim d_kv dim_head
        q_lora_rank kv_lora_rank qk_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim mamba_d_state mamba_d_head mamba_head_dim state_size ssm_state_size
        rwkv_head_size index_head_dim query_pre_attn_scalar dim_model_base""",
    VOCABULARY: "vocab_size unpadded_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions max_seq_len n_ctx max_seq_length",
    32: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
        moe_shared_expert_intermediate_size expert_hidden_size moe_latent_size""",
    8: """sliding_window attention_chunk_size sliding_window_size attention_window_size window_size
        qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_n_heads mamba_num_heads mamba_chunk_size
        mamba_dt_rank chunk_size time_step_rank index_topk laurel_rank hidden_size_per_layer_input
        rotary_dim adapter_rank block_size""",
    1: """n_group topk_group num_expert_group first_k_dense_replace moe_layer_start_index
        num_dense_layers mamba_n_groups mamba_ngroups n_groups num_mem_blocks""",
    128: "mamba_d_ssm",
    0: "num_kv_shared_layers num_nextn_predict_layers decoder_layerdrop",
}
_VISION_NAMES: dict[Any, str] = {
    32: "hidden_size d_model embed_dim dim model_dim width vision_hidden_size",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim mlp_dim",
    2: """num_hidden_layers depth num_layers layers encoder_layers decoder_layers n_layers
        num_global_layers num_attention_heads num_heads heads encoder_attention_heads
        decoder_attention_heads attention_heads num_key_value_heads""",
    16: "head_dim num_position_embeddings position_embedding_size",
    HIDDEN: """out_hidden_size text_hidden_size projection_dim vision_output_dim output_dim
        output_hidden_size text_embed_dim vocab_size codebook_size""",
}
_SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MEDIA_TOKEN = re.compile(
    r"(image|video|audio|vision|boi|eoi|boa|eoa|user|sep)\w*_token(_id|_index)$"
)
_TEXT_PARTS = ("llm_config", "language_config", "thinker_config", "decoder")


def _rules(names: Mapping[Any, str]) -> dict[str, Any]:
    return {name: value for value, listed in names.items() for name in listed.split()}


TEXT = _rules(_TEXT_NAMES)
VISION = {
    **_rules(_VISION_NAMES), "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0],
}  # fmt: skip
_ALTERNATE = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_MAMBAS = {"layer_types": ["mamba", "attention"] * 2}
_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]
    }
}  # fmt: skip
_HALF_SECTIONS = {
    "rope_parameters": {**_SECTIONS["rope_parameters"], "mrope_section": [2, 1, 1],
                        "partial_rotary_factor": 0.5}
}  # fmt: skip
_ALL_KEYS = {"num_key_value_heads": 4}
BY_HAND: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _ALTERNATE),
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), _CONVOLUTIONS),
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "paddleocr_vl_text"), _SECTIONS),
    **dict.fromkeys(("glm4v_text", "glm46v_text", "glm_ocr_text", "qwen2_5_omni_text"), _SECTIONS),
    "glm4v_moe_text": _HALF_SECTIONS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "use_mamba_kernels": False},
    "bamba": {"attn_layer_indices": [1, 3]},
    "nemotron_h": {"layers_block_type": ["mamba", "moe", "attention", "mamba"]},
    "granitemoehybrid": _MAMBAS,
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 16,
               "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "deepseek_v2": {"topk_method": "greedy"},
    **dict.fromkeys(("dots3_note_text", "glm5_next_text", "mistral4"), _ALL_KEYS),
    "dots1": {"n_shared_experts": 1},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "siglip_vision_model": {"vision_use_head": False},
}  # fmt: skip


def small_config(model_type: str) -> Any:
    """The tiny configuration of a model type.

    Raises:
        Exception: as the configuration's class does, which a few do for any sizes but their own.
    """
    cls = CONFIG_MAPPING[model_type]
    return cls(**_walk(cls, TEXT))


def _walk(cls: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a configuration class, those of its parts among them."""
    default = cls()
    values, parts = default.to_dict(), getattr(default, "sub_configs", {})
    chosen = {
        name: found
        for name, value in values.items()
        if name not in parts and (found := _small(name, value, rules)) is not None
    }
    for name in parts:
        part = getattr(default, name, None)
        if part is not None:
            text = "text" in name or name in _TEXT_PARTS
            chosen[name] = _walk(type(part), TEXT if text else VISION)
    if "qk_rope_head_dim" in values:  # multi-head latent attention: the rotated part alone
        chosen |= {k: v for k, v in (("head_dim", 8), ("num_key_value_heads", 4)) if k in chosen}
        chosen.pop("qk_head_dim", None)
    return chosen | BY_HAND.get(default.model_type, {})


def _small(name: str, value: Any, rules: Mapping[str, Any]) -> Any:
    if name == "rope_parameters" and "mrope_section" in json.dumps(value):
        return _with_sections(value)
    if rules is TEXT and name in _SPECIAL_IDS:
        return _SPECIAL_IDS[name]
    if rules is TEXT and isinstance(value, int) and _MEDIA_TOKEN.search(name):
        return VOCABULARY - 8 + sum(map(ord, name)) % 8
    if name not in rules or value is None or isinstance(value, bool | dict):
        return None
    found = rules[name]
    return found if isinstance(found, list) or not isinstance(value, list) else None


def _with_sections(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of a multimodal RoPE that add up to half a head of 16."""
    whole = rope.get("partial_rotary_factor", 1) == 1
    return {**rope, "mrope_section": [4, 2, 2] if whole else [2, 1, 1]}
