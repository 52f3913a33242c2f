"""Finding and loading models, and refusing what would not be the model asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tiny import tiny_folder, tiny_model
from tunesmith.errors import ModelError
from tunesmith.model.load import choose_dtype, load_causal_lm, settings_kept, wrap_causal_lm
from tunesmith.model.source import resolve_model

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def copy(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_loaded_model_has_the_files_logits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    causal_lm = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad(), causal_lm.generation() as model:
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
    assert causal_lm.config.use_cache is False
    assert causal_lm.config._attn_implementation == "tunesmith"


def test_bfloat16_leaves_rope_in_float32(folder: Path) -> None:
    causal_lm = load_causal_lm(resolve_model(str(folder)), dtype="bfloat16").model
    assert causal_lm.head.weight.dtype == torch.bfloat16
    exact = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    frequencies = dict(causal_lm.named_buffers())
    assert frequencies
    for name, buffer in exact.named_buffers():
        assert torch.equal(frequencies[name], buffer), name


def test_dtype_follows_capability(monkeypatch) -> None:
    from tunesmith.model.ops import dtype

    monkeypatch.setattr(dtype, "cpu_bfloat16", lambda: "AMX")
    assert choose_dtype("auto", "cpu").dtype == torch.bfloat16
    assert "AMX" in choose_dtype("auto", "cpu").reason
    monkeypatch.setattr(dtype, "cpu_bfloat16", lambda: None)
    assert choose_dtype("auto", "cpu").dtype == torch.float32
    assert choose_dtype("bfloat16", "cpu").dtype == torch.bfloat16


def test_dropout_is_turned_off_and_said(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", attention_dropout=0.25)
    loaded = load_causal_lm(resolve_model(str(folder)), dtype="float32")
    assert any("attention_dropout 0.25" in note for note in loaded.notes)
    assert loaded.model.base.model.layers[0].self_attn.attention_dropout == 0


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("opt", {"dropout": 0.2}),
        ("llama", {"attention_dropout": 0.3}),
    ],
)
def test_dropout_of_a_model_in_memory_is_turned_off(family: str, options: dict) -> None:
    model = tiny_model(family, **options)
    before = model.train()(IDS).logits
    assert not torch.equal(before, model(IDS).logits), "the model is not random to begin with"
    loaded = wrap_causal_lm(model)
    assert loaded.notes
    with loaded.model.generation() as own:
        own.train()
        assert torch.equal(own(IDS).logits, own(IDS).logits)


def test_the_threshold_of_phimoe_is_no_noise(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "phimoe", num_local_experts=4, sliding_window=8)
    causal_lm = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    assert causal_lm.config.router_jitter_noise == 0.01


def test_wrapped_model_is_given_back_as_it_came() -> None:
    model = tiny_model("llama", attention="sdpa")
    model.config.use_cache = False
    with settings_kept(model):
        wrap_causal_lm(model).model.train()
        assert model.config._attn_implementation == "tunesmith"
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert not model.training


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ModelError, match="no language-model head"):
        wrap_causal_lm(tiny_model("llama").model)


def test_run_folder_stands_for_its_model(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("model: x\n")
    with pytest.raises(ModelError, match="no model/ yet") as caught:
        resolve_model(str(run))
    assert "resume" in (caught.value.hint or "")
    copy(folder, run / "model")
    source = resolve_model(str(run))
    assert source.folder == (run / "model").resolve()
    assert source.name == str(run)


def test_missing_path_names_its_neighbours(folder: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_model(str(folder.parent / "tiny-lama"))
    assert "tiny-llama" in (caught.value.hint or "")


def test_folder_above_a_model_names_the_model(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json") as caught:
        resolve_model(str(folder.parent))
    assert "tiny-llama" in (caught.value.hint or "")


def test_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "m")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickles") as caught:
        resolve_model(str(other))
    assert "save_pretrained" in (caught.value.hint or "")


def test_revision_of_a_folder_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="revision"):
        resolve_model(str(folder), revision="main")


def test_unreachable_hub_is_said(monkeypatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelError, match="can't be reached") as caught:
        resolve_model("somebody/some-model")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("key", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_weights_are_refused(folder: Path, tmp_path: Path, key: str) -> None:
    from safetensors.torch import load_file, save_file

    other = copy(folder, tmp_path / "m")
    state = load_file(other / "model.safetensors")
    del state[key]
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=key):
        load_causal_lm(resolve_model(str(other)), dtype="float32")


def test_weights_of_another_shape_are_refused(folder: Path, tmp_path: Path) -> None:
    other = copy(folder, tmp_path / "m")
    edit(other, vocab_size=500)
    with pytest.raises(ModelError):
        load_causal_lm(resolve_model(str(other)), dtype="float32")


def test_tied_head_is_not_missing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", tie_word_embeddings=True)
    causal_lm = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    assert causal_lm.head.weight is causal_lm.base.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}, r"modeling_own\.py"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "no causal language model"),
        ({"model_type": "made_up_family"}, "made_up_family"),
        ({"model_type": "vit", "architectures": None}, "no causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    ],
)
def test_other_kinds_of_models_are_refused(
    folder: Path, tmp_path: Path, changes: dict, message: str
) -> None:
    other = copy(folder, tmp_path / "m")
    edit(other, **changes)
    with pytest.raises(ModelError, match=message):
        load_causal_lm(resolve_model(str(other)), dtype="float32")
