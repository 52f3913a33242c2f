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
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.errors import InputError, ModelError
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.load import load_causal_lm
from tunesmith.model.memory import estimate, measure
from tunesmith.model.quantized import Quantization
from tunesmith.model.quantized_weight import is_quantized, parameter_count
from tunesmith.model.selftest import self_test
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


def train(
    base: Path,
    out: Path,
    kind: str,
    adapter: Any = None,
    *,
    data: Path | None = None,
    **more: Any,
) -> tunesmith.Run:
    options = {
        "model": {"name": str(base), "dtype": "float32", "quantization": kind},
        "batch": 4,
        "optim": {"lr": 1e-2, "warmup": 0},
        "train": {"steps": 3},
        "adapter": LORA if adapter is None else adapter,
        **more,
    }
    rows = chat_rows() if data is None else str(data)
    return tunesmith.train(options, data=rows, out=out, progress=False)


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
def test_trains_merges_and_reloads_in_plain_peft(
    kind: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[family]
    adapter = {**LORA, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    run = train(base, tmp_path / "whole", kind, adapter)
    model = run.folder / "model"
    assert not (model / "config.json").exists()
    assert "quantization" not in (model / "adapter_config.json").read_text()
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_to_the_bit_the_same(
    kind: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    whole = train(bases[family], tmp_path / "whole", kind)
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows())
    often = {"checkpoint": {"every": 1, "keep": 5}}
    parted = train(bases[family], tmp_path / "parted", kind, data=rows, **often)
    steps = parted.folder / "checkpoints"
    for path in [steps / "step-2", steps / "step-3", parted.folder / "model"]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink()
        path.rmdir()
    resumed = tunesmith.resume(parted.folder, progress=False)
    one = load_file(whole.folder / "model" / "adapter_model.safetensors")
    two = load_file(resumed.folder / "model" / "adapter_model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.parametrize("kind", ["rslora", "dora", "ia3", "loftq"])
@pytest.mark.parametrize("quantization", KINDS)
def test_kinds_train_on_it_and_reload(
    quantization: str, kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter = {"kind": kind} if kind == "ia3" else {**LORA, "kind": kind}
    run = train(bases["llama"], tmp_path / "R", quantization, adapter)
    before = plain_on_ours(load(bases["llama"], quantization))
    trained = plain_on_ours(run.model)
    assert distance(trained, before) > 1e-3
    base = plain(bases["llama"], quantization)
    again = PeftModel.from_pretrained(base, run.folder / "model")
    assert distance(logits(again, training=quantization == "int8"), trained) < 1e-5
    merged = ["merge", str(run.folder), "--out", str(tmp_path / "M")]
    assert command(merged) == (2 if kind == "loftq" else 0)


@torch.no_grad()
def plain_on_ours(model: Any) -> torch.Tensor:
    if hasattr(model, "generation"):
        with model.generation() as inner:
            return inner(input_ids=IDS, use_cache=False).logits
    return logits(model)


@pytest.mark.parametrize("kind", ["pissa", "olora", "vera", "boft", "hra"])
def test_kinds_that_need_plain_weights_are_refused(kind: str, bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="they are quantised"):
        add_adapter(load(bases["llama"], "nf4"), AdapterSpec(kind=kind, rank=4))


def test_without_an_adapter_it_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be trained, only an adapter") as caught:
        train(bases["llama"], tmp_path / "R", "nf4", {"kind": "none"})
    assert "adapter=lora" in str(caught.value.hint)


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_layouts_give_the_same_hidden_states(
    kind: str, family: str, bases: dict[str, Path]
) -> None:
    model = load(bases[family], kind)
    found = self_test(model, max_length=64)
    assert not found.isolated
    assert found.tolerance < 1e-3
    assert not is_quantized(model.head)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind: str, bases: dict[str, Path]) -> None:
    """An outlier in one row is what LLM.int8 would treat a column of all rows for."""
    module = load(bases["llama"], kind).base.model.layers[0].self_attn.q_proj
    rows = torch.randn(4, 64)
    alone = module(rows[:1])
    rows[3] = 50.0
    for training in (True, False):
        torch.testing.assert_close(module.train(training)(rows)[:1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_dequantised_weight(kind: str, bases: dict[str, Path]) -> None:
    from tunesmith.model.quantized_linear import dequantized

    module = load(bases["llama"], kind).base.model.layers[0].mlp.up_proj
    plain_weight = dequantized(module, torch.float32)
    inputs = torch.randn(5, 64, requires_grad=True)
    given = torch.randn(5, 96)
    (found,) = torch.autograd.grad(module(inputs), inputs, given)
    torch.testing.assert_close(found, given @ plain_weight)
    narrow = inputs.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(module(narrow), narrow, given.bfloat16())
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), given @ plain_weight) < 2e-2


def test_loftq_begins_nearer_to_the_plain_weights(bases: dict[str, Path]) -> None:
    """By the best product of its rank (Eckart and Young), whatever the scale."""
    from tunesmith.model.quantized_linear import dequantized

    model = load(bases["llama"], "nf4")
    name = "model.layers.0.self_attn.q_proj"
    add_adapter(model, AdapterSpec(kind="loftq", rank=4, alpha=12, targets=["q_proj"]))
    module = model.base.get_submodule(name)
    kept = dequantized(module.base_layer, torch.float32)
    weight = load_file(bases["llama"] / "model.safetensors")[f"{name}.weight"]
    product = module.lora_B["default"].weight @ module.lora_A["default"].weight * 3
    values = torch.linalg.svdvals(weight - kept)
    rest = (weight - kept - product).detach().norm()
    torch.testing.assert_close(rest, values[4:].norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [False, True])
def test_the_estimate_knows_the_bytes(kind: str, double: bool, bases: dict[str, Path]) -> None:
    if kind == "int8" and double:
        return
    source = ModelSource("base", bases["llama"])
    quantization = Quantization(kind, double=double)
    size = measure(source)
    model = load_causal_lm(source, dtype="float32", quantization=quantization)
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    for module in filter(is_quantized, model.modules()):
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            held[id(module)] = 4 * module.weight.shape[0]
        else:
            held[id(module)] = state.absmax.numel() * state.absmax.element_size()
            if state.nested:
                held[id(state)] = 4 * state.state2.absmax.numel()
    needed = estimate(size, dtype=torch.float32, rank=8, quantization=quantization)
    added = 4 * needed.trained
    assert needed.weights - added == pytest.approx(sum(held.values()), rel=1e-3)
    assert sum(parameter_count(p) for p in model.parameters()) == size.parameters


def test_double_quantisation_changes_the_scales(bases: dict[str, Path]) -> None:
    source = ModelSource("base", bases["llama"])
    one, two = (
        load_causal_lm(source, dtype="float32", quantization=Quantization("nf4", double=double))
        for double in (False, True)
    )
    assert distance(plain_on_ours(one), plain_on_ours(two)) > 1e-5
