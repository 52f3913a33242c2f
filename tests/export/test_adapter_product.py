"""Every kind of adapter on every form of base, dense and with experts: trained, resumed, merged,
exported, and read back by transformers and peft alone. What can't be is refused at the start.

By default a diagonal runs, in which each form and each family appears; `-m slow` runs the others.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.errors import InputError, ModelError
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.load import load_causal_lm
from tunesmith.model.quantization.load import Quantization
from tunesmith.model.source import ModelSource

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

FAMILIES = ("llama", "qwen3_moe")
FORMS = ("none", "nf4", "fp4", "int8", "torchao_int8", "torchao_fp8", "torchao_int4")
ON_ANY_BASE = ("lora", "rslora", "ia3", "vera", "oft", "miss")
KINDS = (*ON_ANY_BASE, "loha", "lokr", "dora", "loftq", "pissa", "olora", "boft", "hra")
ON_EXPERTS = ("lora", "rslora")
DIAGONAL = {
    ("rslora", "none", "qwen3_moe"),
    ("lora", "nf4", "qwen3_moe"),
    ("ia3", "fp4", "llama"),
    ("dora", "int8", "llama"),
    ("dora", "torchao_int8", "qwen3_moe"),
    ("rslora", "torchao_fp8", "llama"),
    ("lora", "torchao_int4", "llama"),
    ("loftq", "nf4", "llama"),
    ("vera", "torchao_int4", "llama"),
    ("oft", "nf4", "llama"),
}
"""The other kinds train, resume and are read back on a plain base in tests/train."""
IDS = torch.tensor([[5, 17, 40, 200, 33, 91, 7, 300, 12, 64, 8, 9, 10]])
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def possible(kind: str, form: str) -> bool:
    """The list that the refusals are held to."""
    if kind in ON_ANY_BASE:
        return True
    if form == "none":
        return kind != "loftq"
    if kind in ("loha", "lokr"):
        return form not in ("nf4", "fp4")
    return kind == "loftq" or (kind == "dora" and form != "torchao_int4")


def everything() -> list[Any]:
    found: list[Any] = []
    for kind in KINDS:
        for form in FORMS:
            for family in FAMILIES:
                if possible(kind, form):
                    often = (kind, form, family) in DIAGONAL
                    marks = [] if often else [pytest.mark.slow]
                    found.append(pytest.param(kind, form, family, marks=marks))
    return found


def section(kind: str, family: str) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind}
    if kind in ("oft", "boft"):
        found["rotation_size"] = 4
    elif kind != "ia3":
        found["rank"] = 4
    if kind in (*ON_EXPERTS, "dora", "pissa", "olora", "loftq", "loha", "lokr"):
        found["alpha"] = 8
    if family == "qwen3_moe" and kind not in ON_EXPERTS:
        found["targets"] = ATTENTION
    return found


def train(base: Path, out: Path, kind: str, form: str, family: str) -> tunesmith.Run:
    options = {
        "model": {"name": str(base), "dtype": "float32", "quantization": form},
        "batch": 4,
        "optim": {"lr": 1e-2, "warmup": 0},
        "train": {"steps": 3},
        "adapter": section(kind, family),
        "checkpoint": {"every": 1, "keep": 5},
    }
    rows = write_jsonl(base / "rows.jsonl", chat_rows())
    return tunesmith.train(options, data=str(rows), out=out, progress=False)


def plain(folder: Path, form: str = "none") -> Any:
    """As transformers loads it, quantised or not, with nothing of ours."""
    if form == "none":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if form.startswith("torchao"):
        from torchao import quantization
        from torchao.quantization.granularity import PerGroup

        settings = {
            "torchao_int8": quantization.Int8WeightOnlyConfig(),
            "torchao_fp8": quantization.Float8WeightOnlyConfig(),
            "torchao_int4": quantization.IntxWeightOnlyConfig(
                weight_dtype=torch.int4, granularity=PerGroup(32)
            ),
        }
        chosen: Any = TorchAoConfig(settings[form], modules_to_not_convert=["lm_head"])
    elif form == "int8":
        chosen = BitsAndBytesConfig(load_in_8bit=True)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["lm_head"],
        )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=chosen, device_map={"": "cpu"}
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16 bitsandbytes would round to bfloat16 in evaluation, and fail
            # on widths that its blocks do not divide.
            module.support_avx512bf16_for_cpu = False
    return model


@torch.no_grad()
def logits(model: Any, *, form: str = "none") -> torch.Tensor:
    """On a CPU bitsandbytes rounds what an 8-bit map is given, except in training."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("eager")
    return model.train(form == "int8")(input_ids=IDS, use_cache=False).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return {
        "llama": tiny_folder(folder / "llama", num_hidden_layers=2),
        "qwen3_moe": tiny_folder(folder / "moe", "qwen3_moe", num_hidden_layers=2, **experts),
    }


@pytest.mark.parametrize(("kind", "form", "family"), everything())
def test_the_way_of_an_adapter(
    kind: str, form: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[family]
    run = train(base, tmp_path / "R", kind, form, family)
    trained = logits(run.model)
    assert distance(trained, logits(plain(base, form), form=form)) > 1e-3, "nothing was learned"

    again = PeftModel.from_pretrained(plain(base, form), run.model_folder)
    assert distance(logits(again, form=form), trained) < 1e-5
    on_plain = trained
    if form != "none":
        on_plain = logits(PeftModel.from_pretrained(plain(base), run.model_folder))
        assert distance(on_plain, trained) > 1e-4, "the base was not quantised"

    check_exports(run, kind, form, base, {"quantised": trained, "plain": on_plain})
    check_resumed(run)


def check_exports(
    run: tunesmith.Run, kind: str, form: str, base: Path, expected: dict[str, torch.Tensor]
) -> None:
    beside = run.folder.parent
    name = str(run.folder)
    whole = {"merge": ["merge", name], "hf": ["export", name, "--to", "hf"]}
    for form_of, line in whole.items():
        done = command([*line, "--out", str(beside / form_of)])
        if kind == "loftq":
            assert done == 2, "what loftq begins with is for the quantised base"
            continue
        assert done == 0
        assert "quantization_config" not in (beside / form_of / "config.json").read_text()
        assert distance(logits(plain(beside / form_of)), expected["plain"]) < 1e-5
    assert command(["export", name, "--to", "adapter", "--out", str(beside / "adapter")]) == 0
    again = PeftModel.from_pretrained(plain(base, form), beside / "adapter")
    assert distance(logits(again, form=form), expected["quantised"]) < 1e-5
    if kind == "loftq":  # away from its run it is still known
        line = ["merge", str(beside / "adapter"), "--out", str(beside / "merged")]
        assert command(line) == 2


def check_resumed(run: tunesmith.Run) -> None:
    """From the first checkpoint on it ends with the same bits."""
    once = load_file(run.model_folder / "adapter_model.safetensors")
    for gone in ("checkpoints/step-2", "checkpoints/step-3", "model"):
        shutil.rmtree(run.folder / gone)
    resumed = tunesmith.resume(run.folder, progress=False)
    twice = load_file(resumed.model_folder / "adapter_model.safetensors")
    assert once.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[name]) for name, tensor in once.items())


@pytest.mark.parametrize("form", FORMS)
def test_what_can_not_be_is_refused_before_anything_is_changed(
    form: str, bases: dict[str, Path]
) -> None:
    source = ModelSource("base", bases["llama"])
    quantization = None if form == "none" else Quantization(form)
    model = load_causal_lm(source, dtype="float32", quantization=quantization).model
    refused = [kind for kind in KINDS if not possible(kind, form)]
    assert refused
    for kind in refused:
        with pytest.raises(ModelError) as caught:
            add_adapter(model, AdapterSpec(kind=kind, rank=4))
        assert kind in str(caught.value)
        assert caught.value.hint
        assert not hasattr(model.model, "peft_config")


def test_a_refused_run_takes_no_step(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torchao's 4 bits"):
        train(bases["llama"], tmp_path / "R", "dora", "torchao_int4", "llama")
    assert not list((tmp_path / "R").rglob("step-*"))


def test_the_diagonal_leaves_no_form_and_no_family_out() -> None:
    kinds, forms, families = zip(*DIAGONAL, strict=True)
    assert set(forms) == set(FORMS)
    assert set(families) == set(FAMILIES)
    assert {"lora", "rslora", "dora", "ia3", "loftq"} <= set(kinds)
    assert all(possible(kind, form) for kind, form, _ in DIAGONAL)
