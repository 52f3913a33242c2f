"""P6 with a template that brings tokens along: the exported folder has them, in every file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tunesmith
from tiny import chat_rows, tiny_folder, tiny_tokenizer
from tunesmith.errors import ModelError

HEADERS = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|head|>' + message['role'] + '<|/head|>' + message['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>' }}{% endif %}"
)
NEW = ("<|head|>", "<|/head|>", "<|eot|>")
SHORT: dict[str, Any] = {"train": {"steps": 3}, "batch": 4, "optim": {"lr": 1e-2, "warmup": 0}}


def donor(folder: Path) -> Path:
    """A folder with a tokenizer alone, whose template uses tokens of its own."""
    own = ("<|begin|>", *NEW, "<|unused|>")
    tokenizer = tiny_tokenizer(HEADERS, extra_special=own, bos_token="<|begin|>")
    tokenizer.save_pretrained(folder)
    return folder


def train(tmp_path: Path, *, size: int, adapter: str, tied: bool, template: str | None = None):
    options = {"tie_word_embeddings": tied, "vocab_size": size}
    base = tiny_folder(tmp_path / "base", template=None, **options)
    recipe = {
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"template": template or str(donor(tmp_path / "donor"))},
        "adapter": adapter,
        **SHORT,
    }
    rows = chat_rows()
    return base, tunesmith.train(recipe, data=rows, out=tmp_path / "R", progress=False)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


SPARE, FULL = 448, len(tiny_tokenizer(None))


@pytest.mark.parametrize("size", [SPARE, FULL], ids=["spare", "grown"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_cloned_template_travels_with_its_tokens(
    adapter: str, tied: bool, size: int, tmp_path: Path
) -> None:
    base, run = train(tmp_path, size=size, adapter=adapter, tied=tied)
    tokenizer = AutoTokenizer.from_pretrained(run.model_folder)
    before = AutoTokenizer.from_pretrained(base)
    assert tokenizer.chat_template == HEADERS
    ids = tokenizer.convert_tokens_to_ids(["<|begin|>", *NEW])
    assert sorted(ids) == list(range(len(before), len(before) + 4))
    assert len(tokenizer) == len(before) + 4
    assert "<|unused|>" not in tokenizer.get_vocab()
    text = "Ünïcode <|im_end|> and 42"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    messages = chat_rows(3)[2]["messages"]
    question = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert question[0] == tokenizer.bos_token_id == ids[0]
    assert set(question) >= {ids[1], ids[2], ids[3]}
    if adapter == "none":
        plain = AutoModelForCausalLM.from_pretrained(run.model_folder)
        rows = plain.get_input_embeddings().weight.shape[0]
        assert plain.config.vocab_size == rows == max(size, FULL + 4)
    else:
        from peft import AutoPeftModelForCausalLM

        plain = AutoPeftModelForCausalLM.from_pretrained(run.model_folder)
    asked = torch.tensor([question])
    torch.testing.assert_close(logits(plain, asked), logits(run.model, asked), rtol=1e-5, atol=1e-5)
    stops = GenerationConfig.from_pretrained(run.model_folder).eos_token_id
    assert ids[3] in (stops if isinstance(stops, list) else [stops])


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_new_rows_are_learned_and_old_ones_stay_under_an_adapter(
    adapter: str, tmp_path: Path
) -> None:
    base, run = train(tmp_path, size=SPARE, adapter=adapter, tied=False)
    start = AutoModelForCausalLM.from_pretrained(base)
    new = [FULL, FULL + 1, FULL + 2, FULL + 3]
    trained = run.model.get_base_model() if adapter == "lora" else run.model
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old = getattr(start, name)().weight.detach()
        now = getattr(trained, name)().weight.detach()
        mean = old[:FULL].mean(0)
        moved = (now[new] - mean).abs().amax(1)
        expected = moved > 1e-4
        assert expected.all(), name
        if adapter == "lora":
            assert torch.equal(now[:FULL], old[:FULL])


def test_chatml_for_a_base_model_adds_nothing_that_is_there(tmp_path: Path) -> None:
    _, run = train(tmp_path, size=SPARE, adapter="none", tied=True, template="chatml")
    tokenizer = AutoTokenizer.from_pretrained(run.model_folder)
    assert len(tokenizer) == FULL
    assert "<|im_start|>" in tokenizer.chat_template
    again = tunesmith.train(
        {"model": str(run.folder), **SHORT}, data=chat_rows(), out=tmp_path / "S", progress=False
    )
    assert AutoTokenizer.from_pretrained(again.model_folder).chat_template == (
        tokenizer.chat_template
    )


def test_an_adapter_with_new_tokens_is_used_and_trained_further(tmp_path: Path) -> None:
    from tunesmith.model.load import load_causal_lm, resolve_model

    _, run = train(tmp_path, size=FULL, adapter="lora", tied=True)
    loaded = load_causal_lm(resolve_model(str(run.folder)), dtype="float32").model
    ids = torch.tensor([[5, FULL, FULL + 1, 17, FULL + 3]])
    torch.testing.assert_close(
        logits(loaded.model, ids), logits(run.model, ids), rtol=1e-5, atol=1e-5
    )
    recipe = {"model": {"name": str(run.folder), "dtype": "float32"}, "adapter": "lora", **SHORT}
    further = tunesmith.train(recipe, data=chat_rows(), out=tmp_path / "S", progress=False)
    config = json.loads((further.model_folder / "adapter_config.json").read_text())
    assert config["trainable_token_indices"]
    assert (logits(further.model, ids) - logits(run.model, ids)).abs().max() > 1e-3


def test_other_tokens_on_an_adapter_are_refused(tmp_path: Path) -> None:
    _, run = train(tmp_path, size=FULL, adapter="lora", tied=True)
    other = tiny_tokenizer(HEADERS.replace("eot", "end"), extra_special=("<|end|>",))
    other.save_pretrained(tmp_path / "other")
    recipe = {
        "model": str(run.folder),
        "adapter": "lora",
        "data": {"template": str(tmp_path / "other")},
        **SHORT,
    }
    with pytest.raises(ModelError, match="comes with an adapter"):
        tunesmith.train(recipe, data=chat_rows(), out=tmp_path / "S", progress=False)
