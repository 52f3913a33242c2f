"""A base of 4 or 8 bits under an adapter: what is quantised, computed, counted and refused.

How adapters on it train, resume and are exported is in tests/export/test_adapter_product.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunesmith
from tiny import chat_rows, tiny_folder
from tunesmith.cli.app import run as tunesmith_command
from tunesmith.errors import InputError, ModelError
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.load import LoadedModel, load_causal_lm
from tunesmith.model.memory.estimate import estimate, measure
from tunesmith.model.ops.packed_weight import is_quantized, parameter_count
from tunesmith.model.quantization.load import Quantization
from tunesmith.model.selftest import self_test
from tunesmith.model.source import ModelSource

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TORCHAO = ("torchao_int8", "torchao_fp8", "torchao_int4")
KINDS = ("nf4", "fp4", "int8", *TORCHAO)
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
    progress: bool = False,
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
    return tunesmith.train(options, data=chat_rows(), out=out, progress=progress)


def load(base: Path, kind: str) -> Any:
    return loaded_as(base, kind).model


def loaded_as(base: Path, kind: str) -> LoadedModel:
    source = ModelSource(str(base), base)
    return load_causal_lm(source, dtype="float32", quantization=Quantization(kind))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    with model.generation() as inner:
        return inner(input_ids=IDS, use_cache=False).logits


def test_without_an_adapter_it_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be trained, only an adapter") as caught:
        train(bases["llama"], tmp_path / "R", "nf4", {"kind": "none"})
    assert "adapter=lora" in str(caught.value.hint)


PAIRS = [(kind, family) for kind in KINDS for family in FAMILIES]


@pytest.mark.parametrize(
    ("kind", "family"), [*PAIRS, *((kind, "gpt2") for kind in ("nf4", "fp4", "int8"))]
)
def test_layouts_give_the_same_hidden_states(
    kind: str, family: str, bases: dict[str, Path]
) -> None:
    model = load(bases[family], kind)
    found = self_test(model, max_length=64)
    assert not found.unpacked
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
    module = load(bases["llama"], kind).base.model.layers[0].mlp.up_proj
    plain_weight = module.plain_weight(torch.float32)
    inputs = torch.randn(5, 64, requires_grad=True)
    given = torch.randn(5, 96)
    (found,) = torch.autograd.grad(module(inputs), inputs, given)
    torch.testing.assert_close(found, given @ plain_weight)
    narrow = inputs.detach().bfloat16().requires_grad_()
    (found,) = torch.autograd.grad(module(narrow), narrow, given.bfloat16())
    assert found.dtype == torch.bfloat16
    assert distance(found.float(), given @ plain_weight) < 2e-2


def test_a_loftq_adapter_is_known_wherever_it_goes(bases: dict[str, Path], tmp_path: Path) -> None:
    """Its beginning makes up for an error that the plain base doesn't have."""
    base = bases["llama"]
    first = train(base, tmp_path / "one", "nf4", {**LORA, "kind": "loftq"}, train={"steps": 1})
    goes_on = {"continue_from": str(first.folder)}
    with pytest.raises(ModelError, match="this base is plain"):
        train(base, tmp_path / "two", "none", goes_on)
    second = train(base, tmp_path / "two", "nf4", goes_on, train={"steps": 1})
    assert "kind: loftq" in (second.folder / "recipe.yaml").read_text()
    for run in (first, second):
        assert tunesmith_command(["merge", str(run.folder), "--out", str(tmp_path / "M")]) == 2
        moved = shutil.copytree(run.model_folder, tmp_path / f"moved-{run.folder.name}")
        assert tunesmith_command(["merge", str(moved), "--out", str(tmp_path / "M")]) == 2
        with pytest.raises(InputError, match="this base is plain"):
            train(moved, tmp_path / "three", "none", {"kind": "none"})
    with pytest.raises(InputError, match="changes the weights below it"):
        train(base, tmp_path / "four", "nf4", {**LORA, "kind": "loftq"}, objective={"kl": 0.1})
    assert not (tmp_path / "M").exists()


MEASURED = """
import gc, json, sys, threading, time
import torch
from tunesmith.model.load import LoadedModel, load_causal_lm
from tunesmith.model.quantization.load import Quantization
from tunesmith.model.source import resolve_model

def load(name, kind):
    load_causal_lm(resolve_model(name), dtype="float32", quantization=Quantization(kind))

def own():
    # without the pages of files, which the system can take back
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def watch():
    global peak
    while True:
        peak = max(peak, own())
        time.sleep(0.001)

torch.set_num_threads(1)
large, small, *kinds = sys.argv[1:]
for kind in kinds:
    load(small, kind)  # what is imported and made once
peak = own()
threading.Thread(target=watch, daemon=True).start()
found = {}
for kind in kinds:
    gc.collect()
    begun = peak = own()
    load(large, kind)
    found[kind] = peak - begun
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system doesn't tell its pages apart")
def test_a_model_is_quantised_in_less_memory_than_it_takes(tmp_path: Path) -> None:
    """Each weight is quantised as it is read; the plain model is never there as a whole."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 10}
    large = tiny_folder(tmp_path / "large", **sizes)
    small = tiny_folder(tmp_path / "small", num_hidden_layers=1)
    plain = sum(path.stat().st_size for path in large.glob("*.safetensors"))
    command = [sys.executable, "-c", MEASURED, str(large), str(small), *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == set(KINDS)
    assert 0 < max(found.values()) < 0.6 * plain, (found, plain)


def test_loftq_begins_nearer_to_the_plain_weights(bases: dict[str, Path]) -> None:
    """By the best product of its rank (Eckart and Young), whatever the scale."""
    model = load(bases["llama"], "nf4")
    name = "model.layers.0.self_attn.q_proj"
    add_adapter(model, AdapterSpec(kind="loftq", rank=4, alpha=12, targets=["q_proj"]))
    module = model.base.get_submodule(name)
    kept = module.base_layer.plain_weight(torch.float32)
    weight = load_file(bases["llama"] / "model.safetensors")[f"{name}.weight"]
    product = module.lora_B["default"].weight @ module.lora_A["default"].weight * 3
    values = torch.linalg.svdvals(weight - kept)
    rest = (weight - kept - product).detach().norm()
    torch.testing.assert_close(rest, values[4:].norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [*KINDS, "nf4 double", "fp4 double"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_estimate_knows_the_bytes(
    kind: str, family: str, dtype: str, bases: dict[str, Path]
) -> None:
    """Tensors of experts are counted as they are kept, in the model's dtype."""
    source = ModelSource("base", bases[family])
    quantization = Quantization(kind.split()[0], double=kind.endswith("double"))
    size = measure(source)
    model = load_causal_lm(source, dtype=dtype, quantization=quantization).model
    held = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    held |= {id(m.weight): weight_bytes(m) for m in filter(is_quantized, model.modules())}
    needed = estimate(size, dtype=getattr(torch, dtype), rank=8, quantization=quantization)
    added = getattr(torch, dtype).itemsize * needed.trained
    assert needed.weights - added == pytest.approx(sum(held.values()), rel=1e-3)
    assert sum(parameter_count(p) for p in model.parameters()) == size.parameters


def weight_bytes(module: Any) -> int:
    """What a quantised weight takes, read from its tensors."""
    weight = module.weight
    if names := getattr(weight, "tensor_data_names", None):
        optional = getattr(weight, "optional_tensor_data_names", [])
        found = [getattr(weight, name) for name in (*names, *optional)]
    elif (state := getattr(weight, "quant_state", None)) is not None:
        nested = [state.state2.absmax] if state.nested else []
        found = [weight.data, state.absmax, *nested]
    else:
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
        found = [weight.data, scales]
    return sum(t.numel() * t.element_size() for t in found if t is not None)


def test_double_quantisation_changes_the_scales(bases: dict[str, Path]) -> None:
    source = ModelSource("base", bases["llama"])
    one, two = (
        load_causal_lm(
            source, dtype="float32", quantization=Quantization("nf4", double=double)
        ).model
        for double in (False, True)
    )
    assert distance(logits(one), logits(two)) > 1e-5


@pytest.mark.parametrize("kind", TORCHAO)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_torchaos(kind: str, dtype: torch.dtype, bases: dict[str, Path]) -> None:
    """4 bits packed by two are the numbers that torchao keeps one to a byte."""
    from torchao.quantization import quantize_

    from tunesmith.model.quantization.torchao import settings

    source = ModelSource("base", bases["llama"])
    model = load_causal_lm(source, dtype=dtype, quantization=Quantization(kind)).model
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"):
        weight = load_file(bases["llama"] / "model.safetensors")[f"{name}.weight"].to(dtype)
        alone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=dtype)
        alone.weight = nn.Parameter(weight, requires_grad=False)
        quantize_(alone, settings(kind))
        found = model.base.get_submodule(name).plain_weight(dtype)
        assert torch.equal(found, alone.weight.dequantize())
        assert not torch.equal(found, weight)
    assert type(model.head.weight) is nn.Parameter


def test_a_start_says_that_experts_stay_as_they_are(
    bases: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = bases["qwen3_moe"]
    loaded = loaded_as(base, "nf4")
    model = loaded.model
    experts = [n for n, p in model.base.named_parameters() if p.ndim == 3]
    assert experts
    assert all(model.base.get_parameter(name).dtype == torch.float32 for name in experts)
    inside = sum(parameter_count(m.weight) for m in filter(is_quantized, model.modules()))
    share = f"{inside / sum(parameter_count(p) for p in model.parameters()):.0%} of the weights"
    note = next(note for note in loaded.notes if "kept as nf4" in note)
    assert share in note
    assert "tensors of experts stay as they are" in note
    train(base, tmp_path / "R", "nf4", progress=True, train={"steps": 1})
    said = next(line for line in capsys.readouterr().err.splitlines() if "model: " in line)
    assert said.endswith("% of its weights kept as nf4, tensors of experts as they are")


@pytest.mark.parametrize("kind", TORCHAO)
def test_what_torchao_has_no_form_for_is_refused(kind: str, bases: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="has no linear map that can be quantised"):
        load(bases["gpt2"], kind)  # its maps are no linear layers of torch


def test_rows_that_make_no_groups_are_refused(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "odd", intermediate_size=80)
    with pytest.raises(ModelError, match=r"down_proj has rows of 80 weights.* groups of 32"):
        load(base, "torchao_int4")
    assert load(base, "torchao_int8")


def test_a_device_that_cannot_is_refused(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.model.quantization import torchao as quantized_torchao

    def refuse(*_: Any) -> None:
        raise RuntimeError("Float8_e4m3fn is not supported here\nmore of it")

    monkeypatch.setattr(quantized_torchao, "quantize_", refuse)
    with pytest.raises(ModelError, match="torchao_fp8 doesn't work on cpu: Float8") as caught:
        load(bases["llama"], "torchao_fp8")
    assert "torchao_int8" in str(caught.value.hint)


@pytest.mark.parametrize(("kind", "extra"), [("nf4", "quant"), ("torchao_int8", "torchao")])
def test_a_missing_library_is_named(
    kind: str, extra: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.model.quantization import load as quantized

    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="which is not installed") as caught:
        load(bases["llama"], kind)
    assert f"tunesmith[{extra}]" in str(caught.value.hint)
