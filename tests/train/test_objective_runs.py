"""Every objective, and every option of one, through `tunesmith.train` on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tiny import difference, tiny_folder
from tunesmith.config.read import read_recipe
from tunesmith.errors import InputError, InterruptedRun, ModelError, RecipeError
from tunesmith.run import resume, train

pytestmark = pytest.mark.usefixtures("torch_settings")

BASE = [
    "batch.documents=3", "train.steps=4", "checkpoint.every=null", "device.threads=1",
    "optim.lr=1e-2", "optim.warmup=0", "optim.schedule=constant", "model.dtype=float32",
]  # fmt: skip


@dataclass
class Left:
    """A finished run, read back from its folder."""

    folder: Path

    @property
    def records(self) -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == "train"]

    def column(self, name: str) -> list:
        return [record[name] for record in self.records]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(next((self.folder / "model").glob("*.safetensors")))

    @property
    def machine(self) -> dict:
        return json.loads((self.folder / "machine.json").read_text())


@pytest.fixture(scope="module")
def given(eight_chats: Path) -> Path:
    tiny_folder(eight_chats / "mixtral", "mixtral", num_hidden_layers=2)
    return eight_chats


@pytest.fixture
def start(given: Path, tmp_path: Path) -> Callable[..., Left]:
    def run(*overrides: str, model: str = "model", **options: Any) -> Left:
        out = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        options = {"out": out, "data": str(given / "rows.jsonl"), "progress": False, **options}
        train(model=str(given / model), overrides=[*BASE, *overrides], **options)
        return Left(options["out"])

    return run


@pytest.fixture(scope="module")
def plain(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    out = tmp_path_factory.mktemp("plain") / "run"
    names = {"model": str(given / "model"), "data": str(given / "rows.jsonl")}
    train(**names, out=out, overrides=BASE, progress=False)
    return Left(out)


CHANGES = {
    "smoothing": ["objective.label_smoothing=0.1"],
    "z-loss": ["objective.z_loss=0.01"],
    "entropy": ["objective.entropy=0.1"],
    "kl": ["objective.kl=0.5"],
    "dft": ["objective=dft"],
    "psft": ["objective=psft"],
    "eaft": ["objective=eaft"],
    "asft": ["objective=asft"],
    "neftune": ["objective.neftune=5"],
    "scheduled sampling": ["objective.scheduled_sampling=0.9"],
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_objective_changes_what_is_learned(start, plain: Left, name: str) -> None:
    run = start(*CHANGES[name])
    assert difference(run, plain) > 1e-4
    assert all(record["loss"] is not None for record in run.records)
    assert len(run.records) == 4


def test_published_settings_are_the_defaults() -> None:
    def settings(name: str) -> dict[str, Any]:
        given = {"model": "m", "data": {"train": "d"}, "objective": name}
        return read_recipe(given).objective.model_dump(exclude_none=True)

    psft = {"eps_low": 0.2, "eps_high": 0.28, "outer_steps": 8, "warmup_epochs": 0.0}
    assert settings("psft").items() >= psft.items()
    assert settings("eaft")["alpha"] == 1.0
    assert settings("asft")["kl"] == 0.05
    terms = ("z_loss", "entropy", "neftune", "router_aux", "scheduled_sampling")
    assert all(settings("nll")[name] == 0 for name in terms)
    assert not settings("nll").keys() & {"kl", "label_smoothing", *psft}


SECOND = {
    "alpha": (["objective=eaft"], ["objective=eaft", "objective.alpha=2"]),
    "asft's kl": (["objective=asft"], ["objective=asft", "objective.kl=1"]),
    "eps_high": (
        ["objective=psft", "optim.lr=1e-3"],
        ["objective=psft", "objective.eps_high=0.01", "optim.lr=1e-3"],
    ),
    "outer_steps": (["objective=psft"], ["objective=psft", "objective.outer_steps=1"]),
    "warmup_epochs": (["objective=psft"], ["objective=psft", "objective.warmup_epochs=0.5"]),
    "smoothed dft": (["objective=dft"], ["objective=dft", "objective.label_smoothing=0.2"]),
}


@pytest.mark.parametrize("name", SECOND)
def test_options_of_an_objective_change_what_it_does(start, name: str) -> None:
    one, two = (start(*options) for options in SECOND[name])
    assert difference(one, two) > 1e-5


def test_reports_of_each_objective(start, plain: Left) -> None:
    common = {"accuracy", "entropy", "logprob", "effective_weight_p50", "effective_weight_p99"}
    assert common <= plain.records[0].keys()
    assert "mean_weight" not in plain.records[0]
    dft = start("objective=dft").records[0]
    assert 0 < dft["mean_weight"] < 1
    assert dft["effective_weight_p99"] == pytest.approx(1, rel=1e-5)
    assert "kl" in start("objective=asft").records[0]
    psft = start("objective=psft", "optim.lr=5e-2")
    assert psft.column("clipped")[0] == 0 < max(psft.column("clipped"))
    assert psft.column("loss")[0] == pytest.approx(-1)
    lenient = start("objective=psft", "optim.lr=5e-2", "objective.eps_low=0.9999")
    assert sum(lenient.column("fallen")) < sum(psft.column("fallen"))


def test_psft_is_nll_where_every_step_is_an_outer_batch(start, plain: Left) -> None:
    """The ratio is then always 1, and its gradient that of log p."""
    run = start("objective=psft", "objective.outer_steps=1")
    assert difference(run, plain) < 1e-6
    assert run.column("loss") == pytest.approx([-1] * 4)


def test_psft_warms_up_with_nll(start, plain: Left) -> None:
    run = start("objective=psft", "objective.warmup_epochs=1", "batch.documents=4")
    usual = start("batch.documents=4")
    assert run.column("loss")[:2] == pytest.approx(usual.column("loss")[:2], rel=1e-6)
    assert run.column("loss")[2] == pytest.approx(-1)


def test_terms_stay_on_during_the_warmup(start) -> None:
    options = ["batch.documents=4", "objective.entropy=0.5"]
    run = start("objective=psft", "objective.warmup_epochs=1", *options)
    assert run.column("loss")[:2] == pytest.approx(start(*options).column("loss")[:2], rel=1e-6)


def test_an_anchor_holds_the_model_near_its_base(start, plain: Left) -> None:
    free = start("objective.kl=1e-9")
    held = start("objective.kl=10")
    assert free.column("kl")[0] == pytest.approx(0, abs=1e-5)
    assert held.column("kl")[-1] < free.column("kl")[-1] / 2


def test_the_base_of_an_adapter_is_the_model_without_it(start) -> None:
    lora = ["adapter=lora", "adapter.rank=4"]
    free, held = start(*lora, "objective.kl=1e-9"), start(*lora, "objective.kl=10")
    assert free.column("kl")[0] == pytest.approx(0, abs=1e-5)
    assert 0 < held.column("kl")[-1] < free.column("kl")[-1] / 2


@pytest.mark.parametrize("noise", ["objective.neftune=5", "objective.scheduled_sampling=0.5"])
def test_noise_is_repeatable_and_stops_sharing(start, plain: Left, noise: str, capsys) -> None:
    one, two = start(noise, progress=True), start(noise)
    assert difference(one, two) == 0
    assert one.machine["chosen"]["share_prefixes"] is False
    assert plain.machine["chosen"]["share_prefixes"] is True
    assert "in expectation only" in " ".join(capsys.readouterr().err.split())


def test_noise_is_in_training_only(start) -> None:
    """The evaluation before the first step sees the model as it is."""
    options = ["data.eval=2", "train.steps=1"]
    first = [
        json.loads(line)
        for run in (start(*options), start(*options, "objective.neftune=20"))
        for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "eval" and json.loads(line)["step"] == 0
    ]
    assert first[0]["nll"] == pytest.approx(first[1]["nll"], rel=1e-6)


def test_evaluation_is_plain_nll_whatever_the_objective(start) -> None:
    options = ["data.eval=2", "train.steps=1"]

    def before(*more: str) -> dict:
        lines = (start(*options, *more).folder / "metrics.jsonl").read_text().splitlines()
        return next(r for r in map(json.loads, lines) if r["kind"] == "eval")

    usual, other = before(), before("objective=eaft", "objective.entropy=0.5")
    assert usual["nll"] == pytest.approx(other["nll"])
    assert usual["perplexity"] == pytest.approx(other["perplexity"])


def test_router_loss_changes_experts_and_is_refused_elsewhere(start) -> None:
    plain = start(model="mixtral")
    balanced = start("objective.router_aux=0.5", model="mixtral")
    assert difference(balanced, plain) > 1e-4
    assert all(value > 0 for value in balanced.column("router_aux"))
    with pytest.raises(ModelError, match="no expert routers"):
        start("objective.router_aux=0.5")


def test_a_given_model_is_given_back_without_hooks(given: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(given / "mixtral")
    train(
        model=model, tokenizer=AutoTokenizer.from_pretrained(given / "mixtral"),
        data=str(given / "rows.jsonl"), out=tmp_path / "run", progress=False,
        overrides=[*BASE, "train.steps=1", "objective.neftune=1", "objective.router_aux=0.1"],
    )  # fmt: skip
    hooked = [m for m in model.modules() if m._forward_hooks and "Router" in type(m).__name__]
    assert not model.get_input_embeddings()._forward_hooks
    assert not [m for m in hooked if any("_keep" in str(h) for h in m._forward_hooks.values())]


def test_an_adapter_that_changed_its_base_is_refused_an_anchor(start) -> None:
    with pytest.raises(RecipeError, match="changes the weights below it"):
        start("adapter=pissa", "objective.kl=0.1")


def test_an_anchor_under_checkpointing_and_in_bfloat16(start) -> None:
    plain = start("objective=asft")
    again = start("objective=asft", "device.gradient_checkpointing=true")
    assert difference(again, plain) < 1e-5
    low = start("objective=asft", "model.dtype=bfloat16")
    assert low.column("kl")[0] == pytest.approx(0, abs=1e-4)


OWN = '''
import torch

def focal(chunk):
    """Focal loss."""
    miss = 1 - chunk.logprob.exp()
    chunk.note("miss", miss)
    return -(miss ** 2) * chunk.logprob

def surprise(chunk):
    return torch.nn.functional.cross_entropy(chunk.logits, chunk.target, reduction="none")

def weighted(chunk):
    with torch.no_grad():
        weight = chunk.logprob.exp()
    return -weight * chunk.logprob

def mean(chunk):
    return -chunk.logprob.mean()

def mixing(chunk):
    return -chunk.logprob + chunk.logprob.mean()

def constant(chunk):
    return torch.ones(len(chunk.target))

def failing(chunk):
    return chunk.nothing

class Right(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, grad):
        return grad * 2

def right(chunk):
    return Right.apply(-chunk.logprob)

class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, grad):
        return grad

def wrong(chunk):
    return Wrong.apply(-chunk.logprob)
'''


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "losses.py"
    path.write_text(OWN)
    return path


def test_an_objective_of_ones_own(start, plain: Left, own: Path) -> None:
    assert difference(start(f"objective={own}:surprise"), plain) < 1e-6
    focal = start(f"objective={own}:focal")
    assert difference(focal, plain) > 1e-4
    assert all(0 < value < 1 for value in focal.column("miss"))
    assert (focal.folder / "objective.py").read_text() == OWN
    start(f"objective={own}:right", "train.steps=1")
    weighted = start(f"objective={own}:weighted")
    assert difference(weighted, start("objective=dft")) < 1e-6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mean", r"one loss for each target, so \[5\] for 5 targets, not \[\]"),
        ("mixing", "mixes targets"),
        ("constant", "does not depend on the logits"),
        ("failing", "AttributeError"),
        ("wrong", "wrong gradient"),
        ("absent", "no function absent"),
    ],
)
def test_a_function_that_is_no_objective_is_refused(start, own: Path, name, message) -> None:
    with pytest.raises(RecipeError, match=message):
        start(f"objective={own}:{name}")


def test_a_file_that_is_not_there_or_broken_is_refused(start, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        start(f"objective={tmp_path}/nothing.py:f")
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\nimport nothing_of_this_name\n")
    with pytest.raises(RecipeError, match="ModuleNotFoundError") as refused:
        start(f"objective={broken}:f")
    assert f"{broken}:2" in str(refused.value)


def test_a_run_goes_on_with_the_objective_it_began_with_only(start, own: Path) -> None:
    options = [f"objective={own}:focal", "checkpoint.every=2"]
    run = start(*options)
    again = {"out": run.folder, "resume": True}
    assert resume(run.folder, progress=False).steps == 4
    start(*options, **again)
    own.write_text(OWN + "\n# changed\n")
    with pytest.raises(InputError, match="objective is not what this run was started with"):
        start(*options, **again)
    assert resume(run.folder, progress=False).steps == 4
    (run.folder / "objective.py").write_text(OWN + "\n# changed\n")
    with pytest.raises(InputError, match="objective is not what this run was started with"):
        resume(run.folder, progress=False)


def test_a_runs_recipe_finds_its_own_copy_of_the_objective(
    start, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(f"objective={own}:focal")
    own.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "objective.py").write_text("def focal(chunk): return -chunk.logprob\n")
    monkeypatch.chdir(elsewhere)
    out = tmp_path / "second"
    train(str(run.folder / "recipe.yaml"), out=out, progress=False)
    assert difference(Left(out), run) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=dtf"], "did you mean dft"),
        (["objective.alpha=2"], "has an effect on eaft only, and the objective is nll"),
        (
            ["objective=psft", "objective.label_smoothing=0.1"],
            "has an effect on nll, dft, eaft, asft only",
        ),
        (["objective=dft", "objective.eps_high=0.1"], "has an effect on psft only"),
        (["objective=psft", "objective.scheduled_sampling=0.1"], "same context"),
        (["objective.scheduled_sampling=0.1", "device.share_prefixes=true"], "share"),
        (["objective.label_smoothing=1"], "below 1"),
        (["objective=loss.py"], "no objective"),
    ],
)
def test_what_does_not_go_together_is_refused(start, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        start(*overrides)


@pytest.mark.parametrize(
    "options",
    [
        ["objective=psft", "objective.outer_steps=3"],
        ["objective=psft", "objective.outer_steps=2", "objective.warmup_epochs=0.4"],
        ["objective=asft", "objective.neftune=5"],
        ["objective.scheduled_sampling=0.5"],
        ["objective=asft", "adapter=lora", "adapter.rank=4"],
    ],
)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_interrupted_inside_an_outer_batch_and_resumed(
    start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], at: int
) -> None:
    import os
    import signal

    from tunesmith.train import trainer

    wanted = start(*options)
    real, done = trainer.train_step, []

    def counted(*args: Any, **kwargs: Any):
        result = real(*args, **kwargs)
        done.append(result)
        if len(done) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(trainer, "train_step", counted)
    out = tmp_path / "stopped"
    with pytest.raises(InterruptedRun):
        start(*options, out=out)
    monkeypatch.setattr(trainer, "train_step", real)
    resume(out, progress=False)
    assert difference(Left(out), wanted) == 0
    assert Left(out).column("loss") == wanted.column("loss")


def test_an_outer_batch_survives_another_layout(start, tmp_path: Path, monkeypatch) -> None:
    """The old policy is found by path: a resume may cut its micro-batches otherwise."""
    import os
    import signal

    from tunesmith.train import trainer

    options = ["objective=psft", "optim.lr=2e-2"]
    wanted = start(*options)
    real, done = trainer.train_step, []

    def counted(*args: Any, **kwargs: Any):
        done.append(real(*args, **kwargs))
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return done[-1]

    monkeypatch.setattr(trainer, "train_step", counted)
    out = tmp_path / "stopped"
    with pytest.raises(InterruptedRun):
        start(*options, out=out)
    monkeypatch.setattr(trainer, "train_step", real)
    changes = ["device.micro_tokens=64", "device.share_prefixes=false"]
    resume(out, overrides=changes, progress=False)
    assert difference(Left(out), wanted) < 1e-5
    assert Left(out).column("clipped") == pytest.approx(wanted.column("clipped"), abs=0.02)
