"""Checkpoints in MXFP4, FP8 and INT4 are trained as bfloat16 weights; the result is a plain
checkpoint of the same model, with every tensor of the published files by its value.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import published
import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.model.load import load_causal_lm, resolve_model
from tunesmith.model.quantization import dequantize
from tunesmith.model.weight_files import WeightFiles

IDS = torch.arange(20, 60)[None]
SHORT = ["batch.documents=4", "model.dtype=float32", "optim.lr=0.01"]
NEXT_TOKEN_LAYER = "model.layers.2.mlp.gate_proj.weight"
"""Of deepseek_v3: no module of transformers reads the layers after the last."""


def fp8(name: str, weight: Tensor) -> dict[str, Tensor]:
    return published.fp8(name, weight, block=32)


def is_map(name: str, tensor: Tensor) -> bool:
    kept = ("embed", "lm_head", "gate.weight")
    return tensor.ndim == 2 and not any(part in name for part in kept)


def is_expert(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 3


KINDS: dict[str, tuple[str, Callable[..., dict[str, Tensor]], Callable[..., bool]]] = {
    "mxfp4": ("gpt_oss", published.mxfp4, is_expert),
    "fp8": ("deepseek_v3", fp8, is_map),
    "int4": ("qwen3", published.int4, is_map),
}


@pytest.fixture(scope="module", params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder; `plain` beside it is the same before it was quantised."""
    kind = request.param
    family, pack, wanted = KINDS[kind]
    place = tmp_path_factory.mktemp(kind)
    folder = tiny_folder(place / kind, family, num_hidden_layers=2)
    tensors = {n: t.bfloat16() for n, t in load_file(folder / "model.safetensors").items()}
    if kind == "fp8":
        tensors[NEXT_TOKEN_LAYER] = torch.randn(96, 64).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folder, place / "plain")
    settings = {"weight_block_size": [32, 32]} if kind == "fp8" else {}
    published.publish(folder, kind, pack, wanted, **settings)
    return folder


def dequantised(folder: Path) -> Any:
    """The model as transformers itself dequantises it; there INT4 needs another package."""
    settings = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}[folder.name](dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, dtype=torch.bfloat16
    )
    return model.float().eval()


def fake_int4(folder: Path) -> dict[str, Tensor]:
    """Weights rounded to sixteen steps of each group of 32, from those before."""
    found = load_file(folder.parent / "plain" / "model.safetensors")
    for name, weight in found.items():
        if is_map(name, weight):
            groups = weight.float().unflatten(-1, (-1, 32))
            step = (groups.abs().amax(-1, keepdim=True) / 7).bfloat16().float()
            numbers = (groups / step).round().clamp(-8, 7)
            found[name] = (numbers * step).flatten(-2).bfloat16()
    return {name: tensor.float() for name, tensor in found.items()}


def trained(base: Path, out: Path, *options: str) -> Path:
    rows = write_jsonl(out.parent / "rows.jsonl", chat_rows(8))
    options = (*SHORT, "train.steps=2", *options)
    tunesmith.train(model=str(base), data=str(rows), out=out, overrides=options, progress=False)
    return out / "model"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def test_weights_are_those_of_transformers_or_of_the_formula(base: Path) -> None:
    loaded = load_causal_lm(resolve_model(str(base)), dtype="float32")
    assert any(note.startswith("published in") for note in loaded.notes)
    mine = dict(loaded.model.base.named_parameters())
    if base.name == "int4":
        wanted = {n: t for n, t in fake_int4(base).items() if n in mine}
    else:
        wanted = dict(dequantised(base).named_parameters())
    assert set(wanted) | {"lm_head.weight"} == set(mine) | {"lm_head.weight"}
    for name, tensor in wanted.items():
        assert torch.equal(mine[name], tensor), name
    before = load_file(base.parent / "plain" / "model.safetensors")
    assert any(not torch.equal(before[n].float(), t) for n, t in wanted.items() if n in before)


def test_the_files_have_the_names_and_shapes_of_a_plain_checkpoint(base: Path) -> None:
    plain, files = load_file(base.parent / "plain" / "model.safetensors"), WeightFiles(base)
    assert set(files.names) == set(plain)
    for name, tensor in plain.items():
        assert files.shape(name) == tuple(tensor.shape)
        assert files.tensor(name).shape == tensor.shape
        part = [slice(1, 3)] * tensor.ndim
        read = files.read(name, [1] * tensor.ndim, [2] * tensor.ndim)
        assert torch.equal(read, files.tensor(name)[tuple(part)])


def test_the_result_of_full_training_is_a_plain_checkpoint(base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "run")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert set(info["unexpected_keys"]) <= {NEXT_TOKEN_LAYER}
    result, files = load_file(folder / "model.safetensors"), WeightFiles(base)
    assert set(result) == set(files.names)
    assert all(tensor.is_floating_point() for tensor in result.values())
    mine = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    with mine.generation() as inside:
        torch.testing.assert_close(logits(inside), logits(model.eval()), rtol=1e-5, atol=1e-5)
    untrained = load_causal_lm(resolve_model(str(base)), dtype="float32").model
    with untrained.generation() as inside:
        assert not torch.allclose(logits(inside), logits(model), atol=1e-3)
    if base.name == "fp8":  # by value, though nothing read it
        assert torch.equal(result[NEXT_TOKEN_LAYER], files.tensor(NEXT_TOKEN_LAYER))


def test_a_resume_is_exact_to_the_bit(base: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    options = [*SHORT, "checkpoint.every=1", "checkpoint.keep=9"]
    found = []
    for name in ("whole", "resumed"):
        out = tmp_path / name
        tunesmith.train(
            model=str(base), data=str(rows), out=out, progress=False,
            overrides=[*options, "train.steps=2"],
        )  # fmt: skip
        if name == "resumed":
            shutil.rmtree(out / "checkpoints" / "step-2")
            shutil.rmtree(out / "model")
            tunesmith.resume(out, progress=False)
        found.append(load_file(out / "model" / "model.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_adapter_names_the_base_and_verify_holds(base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "run", "adapter=lora")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert (
        command(["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "m")]) == 0
    )
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"]
    adapted = load_causal_lm(resolve_model(str(folder)), dtype="float32").model
    with adapted.generation() as inside:
        apart = (logits(inside) - logits(merged.float().eval())).norm() / logits(inside).norm()
    assert apart < 0.02  # the merged weights are rounded to bfloat16, as the published ones were


def test_verify_reads_the_published_base(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "run")
    assert command(["verify", str(tmp_path / "run"), "--documents", "2"]) == 0


def test_it_is_quantised_anew(base: Path, tmp_path: Path) -> None:
    folder = trained(base, tmp_path / "run", "adapter=lora", "model.quantization=nf4")
    adapter = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_quantisation_that_is_not_read_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    arguments = ["--model", str(folder), "--data", str(rows), "--out", str(tmp_path / "run")]
    assert command(["train", *arguments]) == 2
    said = capsys.readouterr().err
    assert "quantised by gptq" in said
    assert "hint: give the unquantised model" in said


def test_blocks_that_do_not_fill_a_dimension_and_whole_factors() -> None:
    weight = torch.randn(200, 150)
    parts = published.fp8("w", weight, block=128)
    found = dequantize.dequantize_fp8(parts["w"], parts["w_scale_inv"]).float()
    factors = parts["w_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    wanted = parts["w"].float() * factors[:200, :150]
    assert torch.equal(found, wanted.bfloat16().float())
    assert float((found - weight).norm() / weight.norm()) < 0.05
    numbers = weight.to(torch.float8_e4m3fn)
    parts = published.fp8("w", weight[:192], block=128)  # two blocks, of 128 and of 64 rows
    short = dequantize.dequantize_fp8(parts["w"], parts["w_scale_inv"]).float()
    assert float((short - weight[:192]).norm() / weight[:192].norm()) < 0.05
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((200, 1), 0.5)):
        half = dequantize.dequantize_fp8(numbers, scale).float()
        assert torch.equal(half, (0.5 * numbers.float()).bfloat16().float())


def test_zero_points_of_int4() -> None:
    numbers = torch.randint(0, 16, (8, 64))
    zero = torch.randint(0, 16, (8, 2))

    def packed(values: Tensor) -> Tensor:
        eights = values.unflatten(-1, (-1, 8)).long()
        whole = (eights << torch.arange(0, 32, 4)).sum(-1)
        return torch.where(whole >= 2**31, whole - 2**32, whole).int()

    scale = torch.rand(8, 2)
    found = dequantize.dequantize_int4(
        packed(numbers), scale, torch.tensor([8, 64]), packed(zero.T).T.contiguous()
    )
    wanted = (numbers - zero.repeat_interleave(32, 1)) * scale.repeat_interleave(32, 1)
    assert torch.equal(found, wanted.bfloat16())
