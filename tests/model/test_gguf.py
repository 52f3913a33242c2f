"""A .gguf made in the test from a known model comes back as that model, with the same token ids."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import CHATML, tiny_model, tiny_tokenizer
from tunesmith.errors import ModelError
from tunesmith.model.gguf import FILES, convert_gguf, is_complete
from tunesmith.model.load import load_causal_lm
from tunesmith.model.source import resolve_model

gguf = pytest.importorskip("gguf")
TEXT = "<|im_start|>user\nAdd 12 and 30: it's  42!\n\n<|im_end|> Ünï 2026"
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves to interleaved pairs, written element by element."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + half * (rows // 2) + pair
        for head in range(heads)
        for pair in range(rows // 2)
        for half in (0, 1)
    ]
    return weight[order]


def write(path: Path, model, **changes) -> Path:
    """The model as llama.cpp's converters lay it out; `changes` overrides header fields."""
    config, tokenizer = model.config, tiny_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].get)
    vocabulary += [f"<unused{i}>" for i in range(config.vocab_size - len(vocabulary))]
    special = {token["content"] for token in backend["added_tokens"]}
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(changes.get("theta", 10000.0))
    writer.add_rope_dimension_count(config.head_dim)
    if "scaling" in changes:
        writer.add_rope_scaling_type(changes["scaling"])
    writer.add_tokenizer_model(changes.get("tokenizer", "gpt2"))
    writer.add_tokenizer_pre(changes.get("pre", "gpt-2"))
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token in special else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(changes.get("add_bos", False))
    writer.add_chat_template(CHATML)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(*as_llama_cpp(name, tensor, config))
    for name, tensor in changes.get("tensors", {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp(name: str, tensor: torch.Tensor, config):
    outer = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in outer:
        return outer[name], tensor.numpy()
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    if part.endswith("q_proj"):
        tensor = permute(tensor, config.num_attention_heads)
    if part.endswith("k_proj"):
        tensor = permute(tensor, config.num_key_value_heads)
    return f"blk.{layer}.{NAMES[part]}.weight", tensor.numpy()


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", bos_token_id=1)


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    convert_gguf(write(folder / "tiny.gguf", model), folder / "out", dtype=torch.float32)
    return folder / "out"


def test_logits_are_the_original_models(model, converted: Path) -> None:
    ids = torch.arange(3, 60)[None]
    causal_lm = load_causal_lm(resolve_model(str(converted)), dtype="float32").model
    with torch.no_grad(), causal_lm.generation() as loaded:
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_token_ids_and_template_are_the_originals(converted: Path) -> None:
    from transformers import AutoTokenizer

    original, loaded = tiny_tokenizer(), AutoTokenizer.from_pretrained(converted)
    assert loaded(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    assert loaded.decode(loaded(TEXT)["input_ids"]) == TEXT
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "Hello"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == original.apply_chat_template(
        messages, tokenize=False
    )


def test_files_speak_to_both_generations_of_readers(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    settings = json.loads((converted / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["chat_template"] == (converted / "chat_template.jinja").read_text() == CHATML
    assert json.loads((converted / "generation_config.json").read_text())["eos_token_id"] == 2


def test_file_is_a_model_name_and_converted_once(model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write(tmp_path / "tiny.gguf", model)
    source = resolve_model(str(path))
    assert source.folder.is_relative_to(tmp_path / "cache" / "tunesmith")
    assert is_complete(source.folder)
    before = (source.folder / "config.json").stat().st_mtime_ns
    assert resolve_model(str(path)) == source
    assert (source.folder / "config.json").stat().st_mtime_ns == before
    (source.folder / FILES[0]).unlink()
    assert is_complete(resolve_model(str(path)).folder)
    assert [p for p in source.folder.parent.iterdir() if p.name.startswith(".")] == []


def test_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    path = tmp_path / "tied.gguf"
    state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.state_dict = lambda: state
    convert_gguf(write(path, model), tmp_path / "out", dtype=torch.float32)
    causal_lm = load_causal_lm(resolve_model(str(tmp_path / "out")), dtype="float32").model
    assert torch.equal(causal_lm.head.weight, state["model.embed_tokens.weight"])


def test_smollm_splits_every_digit_and_llama_splits_three(model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    def split(pre: str) -> list[str]:
        convert_gguf(write(tmp_path / f"{pre}.gguf", model, pre=pre), tmp_path / pre)
        backend = AutoTokenizer.from_pretrained(tmp_path / pre).backend_tokenizer
        return [text for text, _ in backend.pre_tokenizer.pre_tokenize_str("in 12345")]

    assert split("smollm") == ["in", "Ġ", "1", "2", "3", "4", "5"]
    assert split("llama-bpe") == ["in", "Ġ", "123", "45"]
    assert split("gpt-2") == ["in", "Ġ12345"]


def test_bos_is_put_first_where_the_file_says_so(model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert_gguf(write(tmp_path / "m.gguf", model, add_bos=True), tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma3"}, "gemma3"),
        ({"tokenizer": "llama"}, "only byte-level BPE"),
        ({"pre": "qwen2"}, "qwen2"),
        ({"scaling": gguf.RopeScalingType.YARN}, "scaled RoPE"),
        ({"tensors": {"rope_freqs.weight": np.ones(8, np.float32)}}, "rope_freqs"),
    ],
)
def test_what_is_unknown_is_refused_by_name(model, tmp_path: Path, changes, message) -> None:
    path = write(tmp_path / "m.gguf", model, **changes)
    with pytest.raises(ModelError, match=message):
        convert_gguf(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"], "half a conversion is left"


def test_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUX" + bytes(100))
    with pytest.raises(ModelError, match="no readable"):
        convert_gguf(path, tmp_path / "out")


def test_missing_package_is_said(tmp_path: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="package gguf") as caught:
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert "tunesmith[gguf]" in (caught.value.hint or "")


@pytest.mark.slow
@pytest.mark.skipif("TUNESMITH_SMOLLM2" not in os.environ, reason="TUNESMITH_SMOLLM2 is not set")
def test_smollm2_answers() -> None:
    from transformers import AutoTokenizer

    folder = Path(os.environ["TUNESMITH_SMOLLM2"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    causal_lm = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    with torch.no_grad(), causal_lm.generation() as model:
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
