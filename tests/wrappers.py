"""Tiny random multimodal checkpoints, in the class that their config.json names, with tensors that
no module reads (an MTP layer), as published ones have.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    vocab_size=448,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
)
MROPE: dict[str, Any] = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]
    }
}  # fmt: skip
LINEAR: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"],
    linear_num_value_heads=4,
    linear_num_key_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
EXPERTS: dict[str, Any] = dict(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
)
DEPTH: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=32, depth=1, num_heads=2, out_hidden_size=64
)
WRAPPERS: dict[str, dict[str, Any]] = {
    "qwen3_5": dict(text_config=LINEAR, vision_config=DEPTH),
    "qwen3_5_moe": dict(text_config={**LINEAR, **EXPERTS}, vision_config=DEPTH),
    "qwen3_vl": dict(
        text_config=MROPE,
        vision_config={**DEPTH, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen2_5_vl": dict(text_config=MROPE, vision_config=DEPTH),
    "glm4v": dict(text_config=MROPE, vision_config=DEPTH),
    "gemma3": dict(text_config=dict(sliding_window=8), vision_config=VISION),
    "gemma4": dict(
        text_config=dict(sliding_window=8, hidden_size_per_layer_input=8, global_head_dim=32),
        vision_config={**VISION, "position_embedding_size": 16},
    ),
    "mistral3": dict(vision_config={**VISION, "head_dim": 16}),
    "llama4": dict(
        text_config=dict(
            intermediate_size_mlp=96, num_local_experts=4, num_experts_per_tok=1,
            attention_chunk_size=8,
        ),
        vision_config={**VISION, "vision_output_dim": 64, "projector_output_dim": 64},
    ),
    "mllama": dict(
        text_config=dict(cross_attention_layers=[1], num_hidden_layers=3, bos_token_id=1),
        vision_config={
            **VISION, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    ),
    "internvl": dict(vision_config=VISION),
    "llava": dict(vision_config=VISION),
    "smolvlm": dict(vision_config=VISION),
    "lfm2_vl": dict(
        text_config=dict(layer_types=["conv", "full_attention"], conv_dim=64), vision_config=VISION
    ),
}  # fmt: skip
"""Model types with what differs from TEXT and VISION."""
UNREAD = "mtp.layers.0.mlp.up_proj.weight"


def wrapper_folder(folder: Path, family: str, *, seed: int = 0) -> Path:
    """A folder as the hub has it, of the model's own class, with a tensor that no module reads."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig, AutoModelForImageTextToText

    from tiny import tiny_tokenizer

    parts = {name: dict(values) for name, values in WRAPPERS[family].items()}
    parts["text_config"] = {**TEXT, **parts.get("text_config", {})}
    if family in ("llava", "internvl", "mistral3", "smolvlm"):
        kinds = {"llava": "llama", "internvl": "qwen2", "mistral3": "mistral", "smolvlm": "llama"}
        parts["text_config"]["model_type"] = kinds[family]
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **parts))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    tensors = {**load_file(weights), UNREAD: torch.randn(96, 64).to(torch.bfloat16)}
    save_file(tensors, weights, metadata={"format": "pt"})
    return folder
