"""Adapters on a base of 4 or 8 bits: trained, gone on with, merged, and loaded by plain peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import tunesmith
from tiny import chat_rows, tiny_folder
from tunesmith.cli.app import run as command
from tunesmith.model.load import load_causal_lm
from tunesmith.model.quantized import Quantization
from tunesmith.model.quantized_weight import is_quantized
from tunesmith.model.source import ModelSource, resolve_model

pytest.importorskip("bitsandbytes")

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS = ("nf4", "fp4", "int8")
FAMILIES = ("llama", "qwen3_moe")
IDS = torch.tensor([[5, 17, 40, 200, 33, 91, 7, 300, 12, 64, 8, 9, 10]])
LORA = {"kind": "lora", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny_folder(folder / "llama"),
        "qwen3_moe": tiny_folder(folder / "moe", "qwen3_moe", **MOE),
        "gpt2": tiny_folder(folder / "gpt2", "gpt2", n_embd=64, n_layer=2, n_head=4),
    }


def train(base: Path, out: Path, kind: str, adapter: Any = None, **more: Any) -> tunesmith.Run:
    options = {
        "model": {"name": str(base), "dtype": "float32", "quantization": kind},
        "batch": 4,
        "optim": {"lr": 1e-2, "warmup": 0},
        "train": {"steps": 3},
        "adapter": LORA if adapter is None else adapter,
        **more,
    }
    return tunesmith.train(options, data=chat_rows(), out=out, progress=False)


def load(base: Path, kind: str, **more: Any) -> Any:
    source = ModelSource(str(base), base)
    return load_causal_lm(source, dtype="float32", quantization=Quantization(kind), **more)


def plain(base: Path, kind: str | None = None) -> Any:
    """As transformers loads it, quantised or not, with nothing of ours."""
    options: dict[str, Any] = {}
    if kind == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif kind is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head"],
        )
    if options:
        options["device_map"] = {"": "cpu"}
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)


@torch.no_grad()
def logits(model: Any, *, training: bool = False) -> torch.Tensor:
    """In training bitsandbytes does not round what an 8-bit map is given, on a CPU."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("eager")
    return model.train(training)(input_ids=IDS, use_cache=False).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_trains_resumes_merges_and_reloads(
    kind: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[family]
    adapter = {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    run = train(base, tmp_path / "whole", kind, adapter)
    half = train(base, tmp_path / "half", kind, adapter, train={"steps": 3, "epochs": None})
    assert half.folder.is_dir()
    model = run.folder / "model"
    assert not (model / "config.json").exists()
    assert "quantization" not in (model / "adapter_config.json").read_text()
    whole = load_file(model / "adapter_model.safetensors")
    again = load_file(half.folder / "model" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())

    trained = load_causal_lm(
        resolve_model(str(run.folder)), dtype="float32", quantization=Quantization(kind)
    )
    assert any(is_quantized(module) for module in trained.modules())
    with trained.generation() as ours, torch.no_grad():
        expected = ours(input_ids=IDS, use_cache=False).logits
    bare = load(base, kind)
    with bare.generation() as ours, torch.no_grad():
        untrained = ours(input_ids=IDS, use_cache=False).logits
    assert distance(untrained, expected) > 1e-3
    on_quantized = logits(
        PeftModel.from_pretrained(plain(base, kind), model), training=kind == "int8"
    )
    assert distance(on_quantized, expected) < 1e-5
    on_plain = logits(PeftModel.from_pretrained(plain(base), model))
    assert distance(on_plain, expected) > 1e-4  # by the quantisation

    out = tmp_path / "merged"
    assert command(["merge", str(run.folder), "--out", str(out)]) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert distance(logits(plain(out)), on_plain) < 1e-5
