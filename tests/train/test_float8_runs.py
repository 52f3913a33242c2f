"""Runs whose linear maps multiply in float8, emulated: only newer GPUs have such products."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tunesmith
from gang import losses, records
from tiny import chat_inputs, tiny_folder, tiny_model
from tunesmith.build.build import build
from tunesmith.cli.app import run as command
from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError
from tunesmith.model.kernels import float8

pytestmark = pytest.mark.usefixtures("torch_settings")
FLOAT8 = "model.float8=rowwise"
COMMON = [
    "train.steps=4", "optim.lr=0.003", "batch.documents=4", "device.micro_tokens=128",
    "eval.every=2", "checkpoint.every=2", "checkpoint.keep=9", "device.kind=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(chat_inputs(tmp_path_factory.mktemp("given"), held_out=2))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "check_device", lambda _: None)


def run(given: dict[str, Any], out: Path, *options: str) -> Path:
    tunesmith.train(out=out, overrides=[*COMMON, *options], progress=False, **given)
    return out


def held_out(folder: Path) -> list[float]:
    return [record["nll"] for record in records(folder, "eval")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.usefixtures("emulated")
def test_training_is_in_float8_and_nothing_else(given: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, two = run(given, tmp_path / "float8", FLOAT8), run(given, tmp_path / "plain")
    assert losses(one)[0] == pytest.approx(losses(two)[0], rel=0.02)
    assert losses(one)[0] != losses(two)[0]
    assert losses(one)[-1] < losses(one)[0]
    assert held_out(one)[0] == held_out(two)[0]  # before the first step, to the bit
    assert held_out(one)[-1] != held_out(two)[-1]
    found, plain = weights(one), weights(two)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(one / "model")
    assert all(torch.equal(p, found[n]) for n, p in loaded.named_parameters())
    assert "float8" in (one / "recipe.yaml").read_text()


@pytest.mark.usefixtures("emulated")
def test_a_resume_is_the_same_bits(given: dict[str, Any], tmp_path: Path) -> None:
    whole = run(given, tmp_path / "whole", FLOAT8)
    part = tmp_path / "part"
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "step-4")
    shutil.rmtree(part / "model")
    tunesmith.resume(part, progress=False)
    one, two = weights(whole), weights(part)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.usefixtures("emulated")
def test_an_adapter_learns_on_a_frozen_base(given: dict[str, Any], tmp_path: Path) -> None:
    options = ["adapter=lora", "adapter.rank=4", "device.gradient_checkpointing=layers"]
    one = run(given, tmp_path / "float8", FLOAT8, *options)
    two = run(given, tmp_path / "plain", *options)
    assert losses(one) == pytest.approx(losses(two), rel=0.03)
    assert losses(one) != losses(two)
    name = "adapter_model.safetensors"
    assert load_file(one / "model" / name).keys() == load_file(two / "model" / name).keys()


@pytest.mark.usefixtures("emulated")
def test_recomputed_activations_are_the_same(given: dict[str, Any], tmp_path: Path) -> None:
    modes = ("none", "layers", "selective")
    runs = [
        run(
            given, tmp_path / mode, FLOAT8, "train.steps=2", f"device.gradient_checkpointing={mode}"
        )
        for mode in modes
    ]
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])


@pytest.mark.usefixtures("emulated")
def test_a_model_in_memory_is_given_back_as_it_came(given: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tiny_model("llama", num_hidden_layers=2, intermediate_size=72)
    tunesmith.train(
        out=tmp_path / "run", overrides=[*COMMON, "train.steps=1", FLOAT8], progress=False,
        model=model, tokenizer=AutoTokenizer.from_pretrained(given["model"]), data=given["data"],
    )  # fmt: skip
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.usefixtures("emulated")
def test_a_start_says_which_maps_it_is(given: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=2, intermediate_size=72)
    recipe = Recipe.model_validate(
        {"model": {"name": str(folder), "float8": "rowwise"}, "data": given["data"],
         "device": {"kind": "cpu"}}
    )  # fmt: skip
    job = build(recipe)
    job.training.loss.close()
    (line,) = [text for text in job.choices.notes if text.startswith("float8")]
    assert "8 linear maps" in line  # attention's; 16 does not divide 72
    assert "6 are left" in line
    assert "mlp" in line


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("options", "where"),
    [
        (["adapter=lora", "model.quantization=int8"], "model.quantization"),
        (["adapter=dora"], "adapter.kind"),
        (["objective=psft"], "objective.name"),
        (["objective.kl=0.1"], "objective.kl"),
    ],
)
def test_what_it_does_not_go_with(
    options: list[str], where: str, given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="does not go with products in float8") as caught:
        run(given, tmp_path / "run", FLOAT8, *options)
    assert caught.value.where == where
    assert "model.float8=none" in str(caught.value.hint)


@pytest.mark.usefixtures("emulated")
def test_all_that_it_does_not_go_with_is_said_at_once(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        run(given, tmp_path / "run", FLOAT8, "objective=asft")  # which also sets objective.kl
    said = str(caught.value)
    for key in ("objective.name", "objective.kl"):
        assert f"{key}: does not go with products in float8" in said
    assert said.count("or model.float8=none") == 2


def test_a_cpu_is_refused(
    given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(
        ["train", "--model", given["model"], "--data", given["data"], "--out",
         str(tmp_path / "run"), "device.kind=cpu", FLOAT8]
    )  # fmt: skip
    assert code == 2
    said = capsys.readouterr().err
    assert "capability 8.9" in said
    assert "model.float8=none" in said
    assert "Traceback" not in said
