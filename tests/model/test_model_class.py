"""The class that config.json names is loaded, its decoder is found, and what no text reaches is
frozen.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from tiny import tiny_folder, tiny_model
from tunesmith.build.adapter import choose_trained
from tunesmith.config.read import read_recipe
from tunesmith.model.adapters import NO_ADAPTER, AdapterSpec, add_adapter, freeze
from tunesmith.model.adapters.targets import candidates
from tunesmith.model.causal_lm import CausalLM, find_decoder
from tunesmith.model.load import load_causal_lm, resolve_model, wrap_causal_lm
from tunesmith.model.memory.activations import activation_bytes
from tunesmith.model.memory.estimate import measure
from tunesmith.model.reached import freeze_unreached, outermost, unreached_by_text
from tunesmith.model.selftest import self_test
from tunesmith.train.microbatches import model_work
from wrappers import wrapper_folder

TEXT = {"hidden_size": 64, "num_hidden_layers": 2}

MLLAMA = {"model.language_model.layers.1", "model.multi_modal_projector", "model.vision_model"}


def loaded(folder: Path) -> CausalLM:
    return load_causal_lm(resolve_model(str(folder)), dtype="float32").model


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture(scope="module")
def mllama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wrapper_folder(tmp_path_factory.mktemp("models") / "mllama", "mllama")


@pytest.mark.parametrize("named", [["Qwen3_5ForConditionalGeneration"], None, ["Qwen3_5Model"]])
def test_a_composite_model_is_loaded_whole(named: list[str] | None, tmp_path: Path) -> None:
    """The auto class for causal models would make its text part alone."""
    folder = wrapper_folder(tmp_path / "base", "qwen3_5")
    edit(folder, architectures=named)
    model = loaded(folder)
    assert type(model.base).__name__ == "Qwen3_5ForConditionalGeneration"
    assert type(model.decoder).__name__ == "Qwen3_5TextModel"


def test_a_name_of_another_family_is_not_followed(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "base")
    edit(folder, architectures=["MistralForCausalLM"])
    assert type(loaded(folder).base).__name__ == "LlamaForCausalLM"


def test_the_attention_of_the_decoder_alone_is_exchanged(tmp_path: Path) -> None:
    model = loaded(wrapper_folder(tmp_path / "base", "gemma3"))
    assert model.decoder.config._attn_implementation == "tunesmith"
    assert model.base.model.vision_tower.config._attn_implementation != "tunesmith"
    with model.generation():
        assert model.decoder.config._attn_implementation != "tunesmith"
    assert model.decoder.config._attn_implementation == "tunesmith"


def test_a_head_called_decoder_is_not_taken_for_one() -> None:
    model = tiny_model("llama")
    assert find_decoder(model) is model.model
    model.get_decoder = lambda: model.lm_head
    assert find_decoder(model) is model.model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("gptj", {"rotary_dim": 8, "n_embd": 64, "n_layer": 2, "n_head": 4}),
        ("bloom", {"n_layer": 2, "n_head": 4}),
        ("mpt", {"d_model": 64, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_families_without_an_attention_interface_run_unpacked(
    family: str, options: dict, tmp_path: Path
) -> None:
    folder = tiny_folder(tmp_path / "base", family, **options)
    model = loaded(folder)
    found = self_test(model, max_length=100)
    assert found.unpacked
    assert max(found.differences.values()) < 1e-5


def test_a_model_that_fails_at_text_is_refused_without_a_traceback() -> None:
    from tunesmith.errors import ModelError

    model = tiny_model("llama")

    def asks_for_images(*_, **__):
        raise KeyError("pixel_values")

    model.model.forward = asks_for_images
    with pytest.raises(ModelError, match=r"a forward pass over text fails.*pixel_values"):
        self_test(wrap_causal_lm(model).model, max_length=100)


def test_what_no_text_reaches_is_frozen_and_said(mllama: Path) -> None:
    """Of mllama a layer of the decoder too, which sees images only."""
    model = loaded(mllama)
    names = unreached_by_text(model)
    assert set(outermost(model.base, names)) == MLLAMA
    (line,) = freeze_unreached(model, names)
    assert all(part in line for part in MLLAMA)
    named = dict(model.base.named_parameters())
    assert {name for name, p in named.items() if not p.requires_grad} == names
    size = measure(resolve_model(str(mllama)))
    outside = [n for n in names if not n.startswith("model.language_model.")]
    assert size.unread == sum(named[name].numel() for name in outside)


def test_no_adapter_goes_where_no_text_comes(mllama: Path) -> None:
    model = loaded(mllama)
    names = unreached_by_text(model)
    assert any("cross_attn" in name for name in candidates(model).linear)
    recipe = read_recipe({"model": str(mllama), "data": {"train": ["x"]}, "adapter": "lora"})
    attached = choose_trained(recipe, model, NO_ADAPTER, names)
    assert attached.report.names
    assert not [name for name in attached.report.names if f"{name}.weight" in names]


def test_a_tower_is_trained_by_name_and_left_by_top_layers(mllama: Path) -> None:
    model = loaded(mllama)
    freeze(model, parameters=r".*vision_model\.layernorm_pre.*")
    trained = {name for name, p in model.base.named_parameters() if p.requires_grad}
    assert trained == {f"model.vision_model.layernorm_pre.{kind}" for kind in ("weight", "bias")}
    freeze(model, top_layers=1)
    trained = {name for name, p in model.base.named_parameters() if p.requires_grad}
    assert trained
    assert not [name for name in trained if "vision" in name or "multi_modal" in name]


def test_tables_of_a_tower_are_not_taken_for_experts(tmp_path: Path) -> None:
    """gemma4's tower keeps its positions in three dimensions; its layers' heads differ in size."""
    folder = wrapper_folder(tmp_path / "base", "gemma4")
    model = loaded(folder)
    work = model_work(model)
    assert work.pair == 2.0 * (4 * 16 + 4 * 32)
    assert activation_bytes(model.config, dtype=torch.float32) > 0
    found = add_adapter(model, AdapterSpec(rank=2, alpha=4))
    assert found.report.names
    assert all(name.startswith("model.language_model.") for name in found.report.names)


def test_lists_of_widths_are_added_up() -> None:
    """As gemma3n has them."""
    config = AutoConfig.for_model("gemma3n_text", **TEXT, intermediate_size=[96, 32])
    uneven = activation_bytes(config, dtype=torch.float32)
    config = AutoConfig.for_model("gemma3n_text", **TEXT, intermediate_size=64)
    assert uneven == activation_bytes(config, dtype=torch.float32)
