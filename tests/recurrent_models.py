"""Tiny models with recurrent layers, by kind, and documents that reach all their edges."""

from __future__ import annotations

import numpy as np

from tiny import tiny_model
from tunesmith.types import Document, Origin, Segment

LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
HALF_LINEAR = {**LINEAR, "layer_types": ["linear_attention", "full_attention"] * 2}
SMALL_EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MAMBA = {
    "mamba_d_state": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
}
KIMI = {
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_expert_group": 1,
    "topk_group": 1,
}
NEMOTRON = {
    "layers_block_type": ["mamba", "moe", "attention", "mamba"],
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_nextn_predict_layers": 0,
}
ZAMBA2 = {
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "mamba_headdim": 16,
    "chunk_size": 16,
    "num_mem_blocks": 1,
    "adapter_rank": 8,
    "attention_hidden_size": 128,
    "attention_head_dim": 32,
}
JAMBA = {
    "mamba_d_state": 16,
    "mamba_dt_rank": 8,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}

ONE_OF_A_KIND: dict[str, dict] = {
    "qwen3_5_text": HALF_LINEAR,  # gated delta net
    "kimi_linear": KIMI,  # Kimi delta attention
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},  # Mamba 2
    "mamba": {"state_size": 16, "time_step_rank": 8},  # Mamba 1
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},  # short convolution
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 16},  # lightning
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 32},  # RG-LRU
}
MORE: dict[str, dict] = {
    "qwen3_next": {**HALF_LINEAR, **SMALL_EXPERTS, "num_experts": 4, "num_experts_per_tok": 2},
    "olmo_hybrid": LINEAR,
    "mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "expand": 2, "chunk_size": 16},
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 96,
    },
    "nemotron_h": NEMOTRON,
    "zamba2": ZAMBA2,
    "falcon_mamba": {"state_size": 16, "time_step_rank": 8},
    "jamba": JAMBA,
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_dense_layers": 1,
        "moe_intermediate_size": 32,
    },
}
RECURRENT = {**ONE_OF_A_KIND, **MORE}


def recurrent_model(family: str, **options):
    """A float32 causal LM with random weights that remember: decays are neither 0 nor 1."""
    return tiny_model(family, **{**RECURRENT[family], **options})


def segment(ids, parent: int, start: int, index, weight=None) -> Segment:
    index = np.array(index, np.int32)
    weight = np.ones(len(index)) if weight is None else np.asarray(weight)
    return Segment(
        np.asarray(ids, np.int32),
        parent,
        start,
        index,
        weight.astype(np.float32),
        np.zeros(len(index), np.int32),
    )


def edge_documents() -> list[Document]:
    """A short document before longer ones; paths over several chunks; a prefix that ends inside a
    chunk; branches after one and two tokens, inside a convolution's reach; a repeated row.
    """
    rng = np.random.default_rng(0)

    def draw(count: int):
        return rng.integers(3, 400, count)

    prefix = draw(70)
    rows = [(segment(draw(9), -1, 0, range(3, 9)),), (segment(draw(150), -1, 0, range(100, 150)),)]
    for count in (7, 33, 80):
        ids = np.concatenate([prefix, draw(count)])
        places = range(len(ids) - 6, len(ids))
        rows.append((segment(ids, -1, 0, places, rng.uniform(0.5, 2, 6)),))
    trunk = draw(12)
    rows.append(
        (
            segment(trunk, -1, 0, [5, 11]),
            segment(draw(1), 0, 12, [0]),
            segment(draw(2), 1, 13, [0, 1]),
            segment(draw(3), 1, 13, [0, 2]),
            segment(draw(20), 2, 15, [0, 1, 19]),
            segment(draw(25), 2, 15, [0, 1, 24]),
        )
    )
    rows.append(rows[2])
    return [Document(segments, Origin("made", i)) for i, segments in enumerate(rows)]


def paths(document: Document):
    """(ids from the root, places of the segment's targets in them, weights) of each segment with
    targets.
    """
    for number, last in enumerate(document.segments):
        chain = [number]
        while document.segments[chain[-1]].parent >= 0:
            chain.append(document.segments[chain[-1]].parent)
        ids = np.concatenate([document.segments[i].ids for i in reversed(chain)])
        if len(last.index):
            yield ids, last.start + last.index, last.weight
