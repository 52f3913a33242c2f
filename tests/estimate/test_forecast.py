"""What `tunesmith plan` says of a run is what the run does."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import tunesmith
from tunesmith.cli.app import run as command
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.read import read_recipe
from tunesmith.config.values import Duration
from tunesmith.estimate import forecast
from tunesmith.estimate.forecast import evaluations
from tunesmith.estimate.workload import evenly_spaced

SETTINGS = [
    "batch.documents=2", "train.epochs=2", "optim.lr=1e-3", "device.kind=cpu",
    "model.dtype=float32",
]  # fmt: skip


@pytest.fixture
def asked(llama_folder: Path, chats: Path) -> list[str]:
    return ["--model", str(llama_folder), "--data", str(chats), *SETTINGS]


@pytest.mark.any_dtype
def test_counts_are_those_of_the_run(llama_folder: Path, chats: Path, tmp_path: Path) -> None:
    recipe = read_recipe({"model": str(llama_folder), "data": {"train": [str(chats)]}}, SETTINGS)
    found = forecast(recipe)
    run = tunesmith.train(recipe, out=tmp_path / "run", progress=False)
    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in records if record["kind"] == "train"]
    assert found.work.steps == run.steps == len(steps) > 0
    assert found.work.tokens == sum(step["tokens"] for step in steps)
    assert found.work.computed == sum(step["computed_tokens"] for step in steps)
    assert found.work.target_tokens == sum(step["target_tokens"] for step in steps)
    assert found.work.padded >= found.work.unshared >= found.work.computed
    assert found.memory["gradients"] == found.memory["weights"] == 4 * found.trained
    assert found.memory["optimizer"] == 2 * 4 * found.trained
    assert found.memory["activations"] > 0
    assert found.memory["checkpoint copy"] == 3 * 4 * found.trained + 8  # and the steps' counter
    assert sum(found.memory.values()) == found.measured.peak
    assert found.train_seconds > 0
    assert found.fits


def test_prints_one_object_and_leaves_nothing_behind(
    asked: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert command(["plan", *asked, "--json", "device.gradient_checkpointing=selective"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["gradient_checkpointing"] == "selective"
    assert found["trained"] == found["parameters"]
    assert sorted(tmp_path.rglob("*")) == before


def test_paged_state_is_not_counted_as_memory(llama_folder: Path, chats: Path) -> None:
    recipe = read_recipe({"model": str(llama_folder), "data": {"train": [str(chats)]}}, SETTINGS)
    module = importlib.import_module("tunesmith.estimate.forecast")
    asked = recipe.device.model_copy(update={"paged_optimizer": True})
    job = module.build(recipe.model_copy(update={"device": asked}))
    parts = module.memory_parts(job, peak=10**9, activations=0, working=0)
    moments = 8 * job.training.trained_parameters
    assert 0 < job.training.optimizer.paged_bytes < moments
    assert parts["optimizer"] == moments - job.training.optimizer.paged_bytes


def test_memory_of_16_bit_weights_and_a_base_model(llama_folder: Path, chats: Path) -> None:
    changes = [*SETTINGS, "model.dtype=bfloat16", "objective.kl=0.1"]
    recipe = read_recipe({"model": str(llama_folder), "data": {"train": [str(chats)]}}, changes)
    found = forecast(recipe)
    assert found.memory["weights"] == found.memory["base model"] == 2 * found.trained
    assert found.memory["optimizer"] == (2 + 2 * 4) * found.trained


@pytest.mark.parametrize(
    ("asked", "room", "copied"),
    [("auto", 10_000, 0), ("auto", 10**9, 1), ("false", 10**9, 0), ("true", 10_000, 1)],
)
def test_a_copy_for_checkpoints_is_counted_where_one_is_made(
    llama_folder: Path, chats: Path, asked: str, room: int, copied: int
) -> None:
    module = importlib.import_module("tunesmith.estimate.forecast")
    changes = [*SETTINGS, "adapter=lora", "adapter.rank=2", f"checkpoint.background={asked}"]
    recipe = read_recipe({"model": str(llama_folder), "data": {"train": [str(chats)]}}, changes)
    job = module.build(recipe)
    found = module.copy_beside(job, peak=5_000, free=5_000 + room)
    saved = sum(t.numel() * t.element_size() for t in job.training.optimizer.state_dict().values())
    assert found == copied * saved
    assert saved > 10_000


def test_the_page_warns_of_few_steps(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", *asked, "adapter=lora"]) == 0
    page = capsys.readouterr().out
    assert "warning: only 12 optimizer steps" in page
    assert "padded to the longest row of each step" in page


def test_a_run_that_does_not_fit_ends_with_1_and_what_would(
    asked: list[str], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    module = importlib.import_module("tunesmith.estimate.forecast")

    def pretended(job, work):
        return module.Measured(10**9, 6 * 10**8, 10**8, 1e-3, 0.0, 1)

    monkeypatch.setattr(module, "probe", pretended)
    monkeypatch.setattr(module, "free_memory", lambda _: 7 * 10**8)
    asked = [*asked, "device.micro_tokens=1024"]
    assert command(["plan", *asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert "device.gradient_checkpointing=layers" in found["would_fit"]
    assert "device.micro_tokens=512" in found["would_fit"]
    assert "adapter=lora" not in found["would_fit"]  # a tiny model's state is not what it takes


@pytest.mark.parametrize(
    ("every", "count"),
    [
        (None, 2),
        (Duration(5, "steps"), 3),  # 0, 5, 10
        (Duration(4, "steps"), 4),  # 0, 4, 8, 10
        (Duration(0.5, "epochs"), 5),
        (Duration(20, "steps"), 2),
    ],
)
def test_evaluations_are_counted(every: Duration | None, count: int) -> None:
    assert evaluations(every, steps=10, epochs=2.0, seconds=60.0) == count


def test_a_plan_names_all_that_its_ranks_would_refuse(
    asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # this machine starts one rank, so the plan is for ranks of others
    changes = ["device.shard=full", "optim=muon", "adapter=dora", "device.compile=layers"]
    assert command(["plan", *asked, *changes]) == 2
    said = capsys.readouterr().err
    for key in ("optim.name", "adapter.kind", "device.compile=layers"):
        assert key in said
    assert "nobody" not in said


@pytest.mark.parametrize(
    ("changes", "ranks", "facts"),
    [
        ([], 1, Facts(1, 1, "cpu")),
        (["device.context_parallel=2"], 1, Facts(2, 2, "cuda")),
        (["device.tensor_parallel=3"], 1, Facts(3, 3, "cuda")),
        (["device.kind=cpu", "device.context_parallel=2"], 1, Facts(2, 2, "cpu")),
        (["device.shard=full", "device.shard_offload=true"], 1, Facts(2, 2, "cuda")),
        (["device.shard=hybrid"], 1, Facts(4, 2, "cuda")),
        (["device.shard=hybrid"], 3, Facts(6, 3, "cpu")),
    ],
)
def test_a_plan_is_for_the_ranks_that_the_recipe_asks_for(
    changes: list[str], ranks: int, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("tunesmith.estimate.forecast")
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: False)
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, changes)
    assert module._planned_facts(recipe, ranks) == facts
    check_together(recipe, facts)


def test_steps_are_spread_evenly() -> None:
    assert evenly_spaced(3, 10) == [0, 1, 2]
    assert evenly_spaced(100, 4) == [0, 25, 50, 75]
