"""P6: what a run exports is what it trained, for plain transformers and peft, with tokenizer,
template and stop tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import tunesmith
from tiny import CHATML, FAMILIES, chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.export import read_choice

IDS = torch.tensor([[5, 17, 40, 200, 33, 91, 7, 300, 12, 64, 8, 9, 10]])
SHORT: dict[str, Any] = {"train": {"steps": 2}, "batch": 4, "optim": {"lr": 1e-2, "warmup": 0}}
TERSE = CHATML.replace("assistant\\n", "assistant\\n> ").replace(
    "message['content'] +",
    "('> ' if message['role'] == 'assistant' else '') + message['content'] +",
)
"""A template unlike the model's own: answers are quoted."""


DTYPE = {"dtype": "float32"}


def train(folder: Path, out: Path, **more: Any) -> tunesmith.Run:
    options = {"model": {"name": str(folder)}, **SHORT, **more}
    rows = None if "data" in options else chat_rows()
    return tunesmith.train(options, data=rows, out=out, progress=False)


def logits(model: Any) -> torch.Tensor:
    """Of any causal LM, through the model's plain attention."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def reloaded(run: tunesmith.Run, base: Path, *, lora: bool) -> Any:
    if not lora:
        return AutoModelForCausalLM.from_pretrained(run.model_folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), str(run.model_folder)
    )


@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_trained_one(family: str, adapter: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", family)
    run = train(base, tmp_path / "R", adapter=adapter, model={"name": str(base)} | DTYPE)
    plain = reloaded(run, base, lora=adapter == "lora")
    found, expected = logits(plain), logits(run.model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    before = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (before - found).abs().max() > 1e-3, "nothing was learned, so nothing is shown"
    own, theirs = (
        AutoTokenizer.from_pretrained(base),
        AutoTokenizer.from_pretrained(run.model_folder),
    )
    messages = chat_rows(3)[2]["messages"]
    render = {"conversation": messages[:-1], "add_generation_prompt": True}
    assert own.apply_chat_template(**render) == theirs.apply_chat_template(**render)
    text = "Ünïcode <|im_end|> and 42"
    assert own(text)["input_ids"] == theirs(text)["input_ids"]
    stops = GenerationConfig.from_pretrained(run.model_folder).eos_token_id
    assert own.convert_tokens_to_ids("<|im_end|>") in (
        stops if isinstance(stops, list) else [stops]
    )


def test_a_bfloat16_model_is_exported_to_the_bit(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    run = train(base, tmp_path / "R", model={"name": str(base), "dtype": "bfloat16"})
    plain = AutoModelForCausalLM.from_pretrained(run.model_folder, dtype="auto")
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(logits(plain), logits(run.model), rtol=0, atol=0)


def test_an_adapter_of_a_bfloat16_model_differs_by_rounding_alone(tmp_path: Path) -> None:
    from peft import PeftModel

    base = tiny_folder(tmp_path / "base")
    section = {"name": str(base), "dtype": "bfloat16"}
    run = train(base, tmp_path / "R", model=section, adapter="lora")
    origin = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = logits(origin)
    plain = PeftModel.from_pretrained(origin, str(run.model_folder))
    ours, theirs = (adapter_weights(model) for model in (run.model, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found, expected = logits(plain).float(), logits(run.model).float()
    assert (found - expected).norm() < 2e-2 * expected.norm()
    assert (before - expected).norm() > 5 * (found - expected).norm()


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().float() for name, p in model.named_parameters() if "lora_" in name}


def test_a_template_file_travels_with_the_model(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    file = tmp_path / "terse.jinja"
    file.write_text(TERSE)
    run = train(base, tmp_path / "R", data={"template": str(file)} | rows_file(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(run.model_folder)
    assert tokenizer.chat_template == TERSE
    inside = json.loads((run.model_folder / "tokenizer_config.json").read_text())
    assert inside["chat_template"] == TERSE
    choice = read_choice(run.model_folder)
    assert choice is not None
    assert not choice.raw
    file.unlink()
    again = train(run.model_folder, tmp_path / "S")  # and is then the model's own
    assert AutoTokenizer.from_pretrained(again.model_folder).chat_template == TERSE


def rows_file(folder: Path, rows: list[dict[str, Any]] | None = None) -> dict[str, str]:
    return {"train": str(write_jsonl(folder / "rows.jsonl", rows or chat_rows()))}


def test_raw_training_is_kept_and_followed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.generate import batched

    base = tiny_folder(tmp_path / "base")
    pairs = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
    data = {"template": "none"} | rows_file(tmp_path, pairs)
    run = train(base, tmp_path / "R", data=data)
    assert tunesmith.read_recipe(run.folder / "recipe.yaml").data.template == "none"
    choice = read_choice(run.model_folder)
    assert choice is not None
    assert choice.raw
    asked: list[list[int]] = []
    own = batched._run

    def watch(model: Any, template: Any, prompts: Any, **options: Any) -> Any:
        asked.extend(list(map(int, prompt)) for prompt in prompts)
        return own(model, template, prompts, **options)

    monkeypatch.setattr(batched, "_run", watch)
    for name in (run.folder, run.model_folder):
        asked.clear()
        out = tmp_path / "answers.jsonl"
        out.unlink(missing_ok=True)
        few = ["--max-new-tokens", "2"]
        data_option = ["--data", data["train"]]
        assert command(["generate", str(name), *data_option, "--out", str(out), *few]) == 0
        assert command(["eval", str(name), *data_option, "--json", *few]) == 0
        plain = AutoTokenizer.from_pretrained(base)
        expected = {tuple(plain(pair["prompt"])["input_ids"]) for pair in pairs}
        assert {tuple(ids) for ids in asked} == expected
        assert len(asked) == 2 * len(pairs)
    capsys.readouterr()
    assert command(["chat", str(run.folder), "--prompt", "1 + 1 =", "--max-new-tokens", "2"]) == 0
