"""What `tunesmith bench` says of a run adds up and comes from what was measured."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch

from tiny import tiny_folder
from tunesmith.bench import bench
from tunesmith.bench import breakdown as parts_module
from tunesmith.bench.breakdown import ATTENTION, HEAD, LINEAR, OPTIMIZER, OTHER, PARTS, part_of
from tunesmith.bench.floor import MatmulRate, matmul_rate, product_dtype, product_shapes
from tunesmith.cli.app import run as command
from tunesmith.config.read import read_recipe
from tunesmith.estimate.workload import training_flops
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.load import load_causal_lm
from tunesmith.model.source import resolve_model

SETTINGS = ["batch.documents=4", "train.epochs=2", "device.kind=cpu", "model.dtype=float32"]
measure = importlib.import_module("tunesmith.bench.measure")


@pytest.fixture
def recipe(llama_folder: Path, chats: Path):
    return read_recipe({"model": str(llama_folder), "data": {"train": [str(chats)]}}, SETTINGS)


def test_parts_add_up_to_the_step(recipe) -> None:
    job = measure.build(recipe)
    found = parts_module.breakdown(job, 0)
    assert tuple(found) == PARTS
    assert all(found[part] > 0 for part in (LINEAR, ATTENTION, HEAD, OPTIMIZER, OTHER))
    assert all(seconds >= 0 for seconds in found.values())
    named = sum(seconds for part, seconds in found.items() if part != OTHER)
    assert named + found[OTHER] == pytest.approx(sum(found.values()))


def test_own_times_are_the_whole_of_what_was_recorded() -> None:
    class Event:
        device_type = "DeviceType.CPU"

        def __init__(self, name: str, own: float, parent: Event | None = None) -> None:
            self.name, self.self_cpu_time_total, self.cpu_parent = name, own, parent

    step = Event("tunesmith bench: " + OPTIMIZER, 1e6)
    head = Event("_HeadLoss", 2e6)
    product = Event("autograd::engine::evaluate_function: MmBackward0", 0.0)
    again = Event("_FlashTree", 64e6, product)  # recomputed
    events = [step, Event("aten::mm", 4e6, step), head, Event("aten::mm", 8e6, head), product,
              Event("aten::mm", 16e6, product), Event("aten::mul", 32e6), again,
              Event("aten::mm", 128e6, again)]  # fmt: skip
    sums: dict[str, float] = {}
    for part, seconds in parts_module._self_seconds(events, on_host=True):
        sums[part] = sums.get(part, 0) + seconds
    assert sums == {
        OPTIMIZER: 5.0,
        HEAD: 10.0,
        LINEAR: 16.0,
        parts_module.LIGHT: 32.0,
        ATTENTION: 192.0,
    }


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::addmm", LINEAR),
        ("autograd::engine::evaluate_function: MmBackward0", LINEAR),
        ("_FlashTreeBackward", ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", ATTENTION),
        ("_HeadLossBackward", HEAD),
        ("torch::autograd::AccumulateGrad", OPTIMIZER),
        ("aten::mul", None),
    ],
)
def test_names_are_known(name: str, part: str | None) -> None:
    assert part_of(name) == part


@pytest.mark.any_dtype
def test_the_floor_is_the_work_at_the_measured_rate(recipe, monkeypatch) -> None:
    rates = iter([1e9, 2e9])
    asked = []

    def pretended(shapes, *, dtype, device):
        asked.append(dtype)
        return MatmulRate(next(rates), "float32", shapes[0])

    monkeypatch.setattr(measure, "matmul_rate", pretended)
    found = bench(recipe, steps=2)
    assert asked == [torch.float32] * 2
    assert len(found.steps) == 2
    assert found.rate.flops_per_second == 2e9  # the better one
    work = sum(step.flops for step in found.steps)
    assert found.floor_seconds == pytest.approx(work / 2e9)
    assert found.floor_share == pytest.approx(found.floor_seconds / found.seconds)
    assert found.tokens_per_second == pytest.approx(
        sum(step.tokens for step in found.steps) / found.seconds
    )


def test_operations_are_six_for_each_trained_weight(tmp_path: Path) -> None:
    causal_lm = load_causal_lm(
        resolve_model(str(tiny_folder(tmp_path / "m"))), dtype="float32"
    ).model
    hidden, width, layers, vocabulary = 64, 96, 4, causal_lm.head.weight.shape[0]
    layer = hidden * (64 + 32 + 32) + 64 * hidden + 3 * hidden * width
    expected = 6 * layers * layer * 10 + 6 * vocabulary * hidden * 3
    assert training_flops(causal_lm, tokens=10, targets=3) == expected
    report = add_adapter(causal_lm, AdapterSpec(rank=2)).report
    frozen = 4 * layers * layer * 10 + 4 * vocabulary * hidden * 3
    assert training_flops(causal_lm, tokens=10, targets=3) == frozen + 6 * 10 * report.trained


def test_a_token_meets_the_experts_it_is_sent_to(tmp_path: Path) -> None:
    folder = str(tiny_folder(tmp_path / "m", "mixtral"))  # 2 of 4 experts
    causal_lm = load_causal_lm(resolve_model(folder), dtype="float32").model
    experts = sum(p.numel() for p in causal_lm.decoder.parameters() if p.dim() == 3)
    others = sum(p.numel() for n, p in causal_lm.decoder.named_parameters()
                 if p.dim() == 2 and "embed" not in n)  # fmt: skip
    assert training_flops(causal_lm, tokens=1, targets=0) == 6 * (others + experts / 2)


def test_products_are_measured_in_what_they_run_in(tmp_path: Path, monkeypatch) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "m")))
    causal_lm = load_causal_lm(source, dtype=torch.bfloat16).model
    wide = importlib.import_module("tunesmith.model.ops.bf16_upcast")
    monkeypatch.setattr(wide, "cpu_bfloat16", lambda: False)
    assert product_dtype(causal_lm) == torch.float32
    monkeypatch.setattr(wide, "cpu_bfloat16", lambda: True)
    assert product_dtype(causal_lm) == torch.bfloat16
    assert product_shapes(causal_lm, 100)[0] in ((100, 64, 96), (100, 96, 64))


def test_the_rate_is_of_the_product() -> None:
    found = matmul_rate([(8, 16, 4)], dtype=torch.float32, device=torch.device("cpu"), seconds=0.0)
    assert found.shape == (8, 16, 4)
    assert found.dtype == "float32"
    assert found.flops_per_second > 0


def test_prints_one_object_and_leaves_nothing_behind(
    llama_folder: Path, chats: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    asked = ["--model", str(llama_folder), "--data", str(chats), *SETTINGS, "--steps", "1"]
    assert command(["bench", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["steps"]) == 1
    assert found["memory"]["weights"] == 4 * found["parameters"]
    assert found["memory"]["activations"] > 0
    assert sum(found["memory"].values()) == found["peak"]
    assert found["work"]["padded"] - found["work"]["unshared"] == found["padding_avoided"] > 0
    assert found["repeats_avoided"] > 0
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_page(llama_folder: Path, chats: Path, capsys) -> None:
    asked = ["--model", str(llama_folder), "--data", str(chats), *SETTINGS, "--steps", "2"]
    assert command(["bench", *asked, "adapter=lora"]) == 0
    page = capsys.readouterr().out
    assert "floor:" in page
    assert all(part in page for part in PARTS)
    assert "padding avoided:" in page
