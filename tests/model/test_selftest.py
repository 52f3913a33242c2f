"""The self-test finds the families that can't be packed, and raises no false alarm for those that
can.
"""

from __future__ import annotations

import pytest
import torch

from recurrent_models import RECURRENT
from tiny import tiny_model
from tunesmith.errors import ModelError
from tunesmith.model.lm_head import LogitTransform
from tunesmith.model.load import wrap_causal_lm
from tunesmith.model.recurrent import replace as recurrent
from tunesmith.model.selftest import self_test

DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_head": 4}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "max_position_embeddings": 64,
}
PACKED = {
    "llama": {},
    "qwen3": {},
    "gemma2": {},
    "mixtral": {},
    "gpt_oss": {},
    "gemma3_text": {"sliding_window": 8},
    "phimoe": {"num_local_experts": 4, "sliding_window": 8},
    "gpt2": GPT2,
    "cohere2": {"sliding_window": 8},
    "granite": {},
    "deepseek_v3": DEEPSEEK,
}
ISOLATED = {"stablelm": {}, "nemotron": {}, "bloom": {}, "xlstm": {}}


def run(family: str, options: dict, *, dtype=torch.float32, max_length: int = 500):
    causal_lm = wrap_causal_lm(tiny_model(family, **options).to(dtype)).model
    return causal_lm, self_test(causal_lm, max_length=max_length)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_families_that_pack(family: str, dtype: torch.dtype) -> None:
    causal_lm, result = run(family, PACKED[family], dtype=dtype)
    assert not result.unpacked, result
    assert not causal_lm.unpacked
    assert set(result.differences) == {"head", "causal", "packed", "tree", "neighbour"}
    assert max(result.differences.values()) < 1e-5
    assert not any(module._forward_pre_hooks for module in causal_lm.modules())
    assert all(p.dtype == dtype for p in causal_lm.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ISOLATED)
def test_families_that_must_be_unpacked(family: str, dtype: torch.dtype) -> None:
    loaded = wrap_causal_lm(tiny_model(family, **ISOLATED[family]).to(dtype))
    causal_lm = loaded.model
    result = self_test(causal_lm, max_length=500)
    assert result.unpacked
    assert causal_lm.unpacked
    assert causal_lm.config._attn_implementation == causal_lm.native_attention
    assert any("one path at a time" in note for note in (*result.notes, *loaded.notes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", sorted(RECURRENT.keys() - {"minimax"}))
def test_recurrent_layers_pack(family: str, dtype: torch.dtype) -> None:
    causal_lm, result = run(family, RECURRENT[family], dtype=dtype)
    assert not result.unpacked, result
    assert not causal_lm.unpacked
    # nemotron_h rounds hidden states to the precision of its weights between the layers
    assert max(result.differences.values()) < (1e-4 if family == "nemotron_h" else 1e-5)
    assert all(p.dtype == dtype for p in causal_lm.parameters())


def test_lightning_attention_packs_where_its_tables_are_not_rounded() -> None:
    """In bfloat16 its decays are read from tables of rounded powers, block by block."""
    assert not run("minimax", RECURRENT["minimax"])[1].unpacked
    model, rounded = run("minimax", RECURRENT["minimax"], dtype=torch.bfloat16)
    assert rounded.unpacked
    assert not recurrent.is_recurrent(model)


def test_recurrent_layers_that_differ_are_run_unpacked(monkeypatch) -> None:
    monkeypatch.setattr(recurrent, "RECURRENCES", {"causal_conv1d_fn": lambda _, own: own})
    model, result = run("lfm2", RECURRENT["lfm2"])
    assert result.unpacked
    assert "other results" in result.notes[0]
    assert not recurrent.is_recurrent(model)
    ids = torch.arange(10, 20)[None]
    expected = tiny_model("lfm2", **RECURRENT["lfm2"])(input_ids=ids).logits
    assert torch.equal(model.base(input_ids=ids).logits, expected)


def test_position_encoding_that_looks_at_neighbours() -> None:
    assert run("llama", DYNAMIC, max_length=500)[1].unpacked
    short = run("llama", DYNAMIC, max_length=60)[1]
    assert not short.unpacked, short


@pytest.mark.parametrize(("softcap", "scale"), [(None, 0.0625), (30.0, 1.0), (5.0, 0.5)])
def test_a_logit_transform_under_another_name_is_found_by_value(softcap, scale) -> None:
    model = tiny_model("llama", my_output_softcap=softcap)
    own = LogitTransform(softcap, scale)
    model.lm_head.register_forward_hook(lambda _, __, logits: own.apply(logits))
    causal_lm = wrap_causal_lm(model).model
    assert causal_lm.logits.identity
    found = self_test(causal_lm, max_length=100)
    assert causal_lm.logits == own
    assert found.logits == own
    assert found.differences["head"] < 1e-5


def test_logits_that_no_transform_gives_are_refused() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _, __, logits: logits + logits.square())
    with pytest.raises(ModelError, match="logits"):
        self_test(wrap_causal_lm(model).model, max_length=100)


def test_model_that_sees_later_tokens_is_refused() -> None:
    class Bidirectional(torch.nn.Module):
        def forward(self, hidden):
            return hidden + hidden.mean(1, keepdim=True)

    model = tiny_model("llama")
    model.model.norm = Bidirectional()
    with pytest.raises(ModelError, match="later tokens"):
        self_test(wrap_causal_lm(model).model, max_length=100)


def test_wrong_window_is_found(monkeypatch) -> None:
    from tunesmith.model.attention import dispatch as attention

    monkeypatch.setattr(attention, "_window", lambda *_: None)
    assert run("cohere2", {"sliding_window": 8})[1].unpacked


def test_noise_in_training_is_said() -> None:
    causal_lm = wrap_causal_lm(tiny_model("llama")).model
    assert not self_test(causal_lm, max_length=100).noisy
    causal_lm.train()
    causal_lm.base.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.5)
    result = self_test(causal_lm, max_length=100)
    assert result.noisy
    assert causal_lm.training
    assert causal_lm.base.model.layers[0].mlp.training
