"""The result of a multimodal base is the whole checkpoint, in the class that its config.json names:
plain transformers and peft read it, and every tensor of the base's files is in it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import tunesmith
from tiny import chat_rows, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.errors import ModelError
from tunesmith.export.merge import find_part, merge_adapters
from tunesmith.model.load import load_causal_lm, resolve_model
from wrappers import UNREAD, WRAPPERS, wrapper_folder

IDS = torch.arange(20, 60)[None]
ALWAYS = ("gemma4", "llama4", "qwen3_5_moe")
FAMILIES = [
    pytest.param(family, marks=[] if family in ALWAYS else pytest.mark.slow) for family in WRAPPERS
]
SHORT = ["train.steps=2", "batch.documents=4", "model.dtype=float32", "optim.lr=0.01",
         "optim.weight_decay=0.1"]  # fmt: skip
TOWERS = ("vision", "visual", "projector", "connector", "mtp.")
Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], dict[str, torch.Tensor]]


def trained(base: Path, out: Path, *options: str) -> Path:
    rows = write_jsonl(out.parent / "rows.jsonl", chat_rows(8))
    tunesmith.train(
        model=str(base), data=str(rows), out=out, overrides=[*SHORT, *options], progress=False
    )
    return out / "model"


def plain(folder: Path) -> Any:
    """The folder's model in its own class, all of whose weights were in the files."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert set(info["unexpected_keys"]) <= {UNREAD}
    assert type(model).__name__ in json.loads((folder / "config.json").read_text())["architectures"]
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def own_logits(folder: Path) -> torch.Tensor:
    with load_causal_lm(resolve_model(str(folder)), dtype="float32").model.generation() as model:
        return logits(model)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def changed(base: Path, result: Path) -> set[str]:
    """Names of tensors that differ in any bit, of two folders that hold the same names."""
    one, two = tensors(base), tensors(result)
    assert one.keys() == two.keys()
    return {n for n in one if one[n].dtype != two[n].dtype or not torch.equal(one[n], two[n])}


@pytest.mark.parametrize("family", FAMILIES)
def test_full_training_gives_the_whole_checkpoint(family: str, tmp_path: Path) -> None:
    base = wrapper_folder(tmp_path / "base", family)
    result = trained(base, tmp_path / "run")
    names = changed(base, result)
    assert names
    assert not [name for name in names if any(part in name for part in TOWERS)]
    assert UNREAD not in names
    torch.testing.assert_close(logits(plain(result)), own_logits(result), rtol=0, atol=1e-6)
    assert (logits(plain(base)) - logits(plain(result))).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_has_the_keys_of_the_class(family: str, tmp_path: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict

    base = wrapper_folder(tmp_path / "base", family)
    adapter = trained(base, tmp_path / "run", "adapter=lora")
    model = plain(base)
    before = logits(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(adapter)).eval()
    assert not [w for w in told if "missing" in str(w.message)]
    assert get_peft_model_state_dict(adapted).keys() == tensors(adapter).keys()
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(own_logits(adapter), after, rtol=0, atol=1e-6)
    merge_adapters([find_part(str(adapter))], tmp_path / "merged")
    names = changed(base, tmp_path / "merged")
    assert names
    assert not [name for name in names if any(part in name for part in TOWERS)]
    torch.testing.assert_close(logits(plain(tmp_path / "merged")), after, rtol=1e-4, atol=1e-4)


def old_names(name: str) -> str:
    """As published before the wrapper's parts were gathered under `model`."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    moved = name.replace("model.language_model.", "language_model.model.")
    return moved if moved != name else name.removeprefix("model.")


def new_names(name: str) -> str:
    if name.startswith("language_model.lm_head."):
        return name.removeprefix("language_model.")
    moved = name.replace("language_model.model.", "model.language_model.")
    return moved if moved != name or name.startswith(("model.", "lm_head")) else f"model.{name}"


@pytest.mark.parametrize("spelled", [old_names, new_names])
def test_names_and_shards_are_those_of_the_base_in_either_spelling(
    spelled: Callable[[str], str], tmp_path: Path
) -> None:
    base = wrapper_folder(tmp_path / "base", "gemma3")
    found = {n if n == UNREAD else spelled(n): t for n, t in tensors(base).items()}
    (base / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": found, "model-00002-of-00002.safetensors": {}}
    for name in [name for name in found if "vision" in name or name == UNREAD]:
        shards["model-00002-of-00002.safetensors"][name] = found.pop(name).to(torch.bfloat16)
    for file, content in shards.items():
        save_file(content, base / file, metadata={"format": "pt"})
    places = {name: file for file, content in shards.items() for name in content}
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    result = trained(base, tmp_path / "run")
    written = json.loads((result / "model.safetensors.index.json").read_text())
    assert written["weight_map"] == places
    sizes = [t.numel() * t.element_size() for t in tensors(result).values()]
    assert written["metadata"]["total_size"] == sum(sizes)
    second = "model-00002-of-00002.safetensors"
    assert (result / second).read_bytes() == (base / second).read_bytes()
    assert changed(base, result) <= shards["model-00001-of-00002.safetensors"].keys()
    torch.testing.assert_close(logits(plain(result)), own_logits(result), rtol=0, atol=1e-6)


def test_what_a_processor_reads_travels_along(tmp_path: Path) -> None:
    base = wrapper_folder(tmp_path / "base", "llava")
    kept = {
        "preprocessor_config.json": '{"size": 224}',
        "video_preprocessor_config.json": '{"fps": 2}',
        "additional_chat_templates/tools.jinja": "{{ messages }}",
    }
    for name, text in kept.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    (base / "other_run").mkdir()
    (base / "other_run" / "recipe.yaml").write_text("model: x\n")
    result = trained(base, tmp_path / "run")
    assert {name: (result / name).read_text() for name in kept} == kept
    assert not (result / "other_run").exists()


def test_the_start_says_what_is_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = wrapper_folder(tmp_path / "base", "llava")
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    given = ["train", "--model", str(base), "--data", str(rows), "--out", str(tmp_path / "run")]
    assert command([*given, *SHORT]) == 0
    shown = capsys.readouterr()
    (line,) = [line for line in (shown.out + shown.err).splitlines() if "no text reaches" in line]
    assert "model.multi_modal_projector, model.vision_tower" in line


# Adapters that are not those of the model.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    return trained(wrapper_folder(place / "base", "llava"), place / "run", "adapter=lora")


def other_prefix(state: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    return {name.replace(".language_model.", "."): tensor for name, tensor in state.items()}


def half_the_layers(state: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if ".layers.1." not in name}


def lora_a_alone(state: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if "lora_A" in name}


def narrowed_targets(state: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    config["target_modules"] = [n for n in config["target_modules"] if n.endswith("q_proj")]
    return state


def a_layer_too_many(state: dict[str, Any], _: dict[str, Any]) -> dict[str, Any]:
    more = {
        n.replace("layers.1.", "layers.7."): t.clone() for n, t in state.items() if "layers.1." in n
    }
    return state | more


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_prefix, "lacks .* and holds other weights, base_model.model.model.layers"),
        (half_the_layers, r"lacks base_model.model.model.language_model.layers.1.*lora_A.weight"),
        (lora_a_alone, "lacks .*lora_B.weight"),
        (narrowed_targets, "holds other weights, .*k_proj.lora_A.weight"),
        (a_layer_too_many, r"holds other weights, .*layers\.7\."),
    ],
)
def test_an_adapter_of_other_keys_is_refused(
    adapter: Path, tmp_path: Path, change: Change, named: str
) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    state = change(load_file(copy / "adapter_model.safetensors"), config)
    save_file(state, copy / "adapter_model.safetensors", metadata={"format": "pt"})
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=named) as caught:
        load_causal_lm(resolve_model(str(copy)), dtype="float32")
    assert caught.value.where == str(copy.resolve())
    base = config["base_model_name_or_path"]
    with pytest.raises(ModelError, match=named):
        trained(Path(base), tmp_path / "run", "adapter=lora", f"adapter.continue_from={copy}")
    assert command(["merge", str(copy), "--out", str(tmp_path / "merged")]) == 2
    assert not (tmp_path / "merged").exists()
