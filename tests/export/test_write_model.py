"""A written model is the trained one for whoever loads it, amid the base's own files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import FAMILIES, tiny_folder
from tunesmith.data.templates.load import load_template
from tunesmith.errors import RunError
from tunesmith.export import DataEntry, ModelCard, TemplateChoice, read_choice, write_model
from tunesmith.model.adapters import NO_ADAPTER, AdapterSpec, add_adapter
from tunesmith.model.load import load_causal_lm, resolve_model, wrap_causal_lm

IDS = torch.tensor([[5, 17, 40, 200, 33, 91, 7, 300, 12, 64]])
CARD = ModelCard("base/model", data=(DataEntry("a|b.jsonl", 12, "sha256:00"),))


def trained(folder: Path, *, lora: bool = False, dtype: str = "float32"):
    """A loaded model whose trainable weights have been moved, its source and template."""
    source = resolve_model(str(folder))
    model = load_causal_lm(source, dtype=dtype, device="cpu").model
    if lora:
        add_adapter(model, AdapterSpec(rank=2, alpha=4))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model, source, load_template(folder)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def own_logits(model) -> torch.Tensor:
    with model.generation() as plain:
        return logits(plain)


def read(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_transformers_computes_the_same(family: str, tmp_path: Path):
    model, source, template = trained(tiny_folder(tmp_path / "base", family))
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert plain.dtype == torch.float32
    torch.testing.assert_close(logits(plain), own_logits(model), rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert (logits(base) - logits(plain)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_computes_the_same(family: str, tmp_path: Path):
    from peft import PeftModel

    model, source, template = trained(tiny_folder(tmp_path / "base", family), lora=True)
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    assert not (tmp_path / "out" / "config.json").exists()
    assert read(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    before = logits(base)
    plain = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    torch.testing.assert_close(logits(plain), own_logits(model), rtol=1e-5, atol=1e-5)
    assert (before - logits(plain)).abs().max() > 1e-2
    assert "tunesmith export RUN --to hf" in (tmp_path / "out" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert read(tmp_path / "out" / "generation_config.json")["eos_token_id"] == 2


def test_experts_have_the_names_of_the_hub(tmp_path: Path):
    model, source, template = trained(tiny_folder(tmp_path / "base", "mixtral"))
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in weights.keys()  # noqa: SIM118
        assert weights.metadata() == {"format": "pt"}


def test_tied_weights_are_written_once(tmp_path: Path):
    model, source, template = trained(tiny_folder(tmp_path / "base", "gemma2"))
    write_model(
        model,
        template,
        source,
        tmp_path / "out",
        card=CARD,
        adapter=NO_ADAPTER,
        dtype=torch.bfloat16,
    )
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
        assert weights.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert read(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_shards_are_those_of_the_base(tmp_path: Path):
    folder = tiny_folder(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    base.save_pretrained(folder, max_shard_size="200KB")
    model, source, template = trained(folder)
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    index = read(tmp_path / "out" / "model.safetensors.index.json")
    assert index == read(folder / "model.safetensors.index.json")
    assert len(set(index["weight_map"].values())) > 1
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(plain), own_logits(model), rtol=1e-5, atol=1e-5)


def test_files_of_the_base_stay_byte_for_byte(tmp_path: Path):
    base = tiny_folder(tmp_path / "base")
    config = read(base / "config.json")
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope["rope_theta"],
        "torch_dtype": "float32",
        "transformers_version": "4.40.0",
        "ours": 1,
    }
    config.pop("dtype")
    tokenizer = read(base / "tokenizer_config.json")
    tokenizer |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": (base / "chat_template.jinja").read_text(),
    }
    (base / "chat_template.jinja").unlink()
    (base / "config.json").write_text(json.dumps(config, indent=7))
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=5))
    (base / "generation_config.json").write_text(
        '{"eos_token_id":[2],  "temperature": 0.6, "do_sample": true}'
    )
    model, source, template = trained(base)
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    names = ["config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_older_readers_find_their_keys(tmp_path: Path):
    base = tiny_folder(
        tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 77_000.0}
    )
    tokenizer = read(base / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "TokenizersBackend"
    (base / "tokenizer_config.json").write_text(
        json.dumps(tokenizer | {"extra_special_tokens": ["<|im_start|>"]})
    )
    model, source, template = trained(base)
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    config = read(tmp_path / "out" / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 77_000.0
    assert config["rope_scaling"] is None
    assert config["dtype"] == config["torch_dtype"] == "float32"
    tokenizer = read(tmp_path / "out" / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    assert tokenizer["chat_template"] == (tmp_path / "out" / "chat_template.jinja").read_text()


def test_missing_stop_ids_are_added(tmp_path: Path):
    base = tiny_folder(tmp_path / "base")
    (base / "generation_config.json").write_text(
        '{"eos_token_id": 0, "top_k": 20, "do_sample": true}'
    )
    model, source, template = trained(base)
    write_model(
        model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER, extra_stop_ids=[1]
    )
    values = read(tmp_path / "out" / "generation_config.json")
    assert values["top_k"] == 20
    assert set(values["eos_token_id"]) >= {0, 1, *template.stop_ids}


def test_a_missing_generation_config_is_made(tmp_path: Path):
    base = tiny_folder(tmp_path / "base")
    (base / "generation_config.json").unlink()
    model, source, template = trained(base)
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    eos = read(tmp_path / "out" / "generation_config.json")["eos_token_id"]
    assert set(eos if isinstance(eos, list) else [eos]) == set(template.stop_ids)


def test_another_template_travels_along(tmp_path: Path):
    base = tiny_folder(tmp_path / "base")
    other = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "other.jinja").write_text(other)
    model, source, _ = trained(base)
    template = load_template(base, template=str(tmp_path / "other.jinja"))
    write_model(model, template, source, tmp_path / "out", card=CARD, adapter=NO_ADAPTER)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == other
    assert read(tmp_path / "out" / "tokenizer_config.json")["chat_template"] == other


def test_choice_and_card(tmp_path: Path):
    model, source, template = trained(tiny_folder(tmp_path / "base"))
    choice = TemplateChoice("own", {"enable_thinking": False})
    card = dataclasses.replace(
        CARD, choice=choice, metrics={"eval nll": 1.23456}, recipe="model: M"
    )
    write_model(model, template, source, tmp_path / "run" / "model", card=card, adapter=NO_ADAPTER)
    assert read_choice(tmp_path / "run" / "model") == choice
    assert read_choice(tmp_path / "base") is None
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "base/model"
    assert "license" not in front
    for part in ("# run\n", "a\\|b.jsonl", "| 12 |", "1.235", "enable_thinking=False", "model: M"):
        assert part in text, part
    serving = (
        'vllm serve run   # each request with chat_template_kwargs: {"enable_thinking": false}'
    )
    assert f"\n{serving}\n" in text


def test_raw_training_is_said(tmp_path: Path):
    model, source, template = trained(tiny_folder(tmp_path / "base"))
    card = dataclasses.replace(CARD, choice=TemplateChoice("none"))
    write_model(model, template, source, tmp_path / "out", card=card, adapter=NO_ADAPTER)
    assert "raw, no chat template" in (tmp_path / "out" / "README.md").read_text()
    choice = read_choice(tmp_path / "out")
    assert choice is not None
    assert choice.raw


def test_a_model_from_memory(tmp_path: Path):
    base = tiny_folder(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain)
    write_model(
        wrap_causal_lm(plain).model,
        load_template(base),
        None,
        tmp_path / "out",
        card=CARD,
        adapter=NO_ADAPTER,
    )
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), before
    )
    config = read(tmp_path / "out" / "config.json")
    assert config["use_cache"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, source, template = trained(tiny_folder(tmp_path / "base"))
    out = tmp_path / "out"
    write_model(model, template, source, out, card=CARD, adapter=NO_ADAPTER)
    kept = (out / "model.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tunesmith.export.weights.save_file", full)
    with pytest.raises(RunError, match="No space left"):
        write_model(model, template, source, out, card=CARD, adapter=NO_ADAPTER)
    assert (out / "model.safetensors").read_bytes() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
