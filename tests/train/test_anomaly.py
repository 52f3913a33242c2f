"""Steps whose numbers are wrong: stopped or left out, with their rows; spikes found and
attributed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.errors import NonFiniteError, RunError
from tunesmith.metrics.records import read_records
from tunesmith.run import Run, resume, train
from tunesmith.train.anomaly import guard as guard_module
from tunesmith.train.anomaly.guard import LEAST, WINDOW, Spikes

SECTIONS = {
    "batch": {"documents": 4},
    "train": {"epochs": 2},
    "checkpoint": {"every": 1, "keep": 99},
    "optim": {"lr": 1e-3, "warmup": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model")
    write_jsonl(place / "rows.jsonl", chat_rows(16))
    return place


def start(folder: Path, out: Path, *, shuffle: bool = True, **sections) -> Run:
    merged = {
        name: {**SECTIONS.get(name, {}), **sections.get(name, {})}
        for name in {*SECTIONS, *sections}
    }
    return train(
        model=str(folder / "model"), data=str(folder / "rows.jsonl"), out=out, progress=False,
        overrides=[f"data.shuffle={shuffle}"], **merged,
    )  # fmt: skip


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def poisoned(monkeypatch: pytest.MonkeyPatch, bad: set[int], *, document: int = 2) -> None:
    """Losses of one document are NaN in the given steps (from 1), as bad arithmetic makes them:
    before the gradient.
    """
    from tunesmith.train.loss import StepLoss

    own = StepLoss.__call__

    def call(self, model, plan, device):
        output = own(self, model, plan, device)
        if self.step + 1 not in bad:
            return output
        hit = torch.from_numpy(plan.owners.target[plan.owners.document == document].astype(int))
        if not len(hit):
            return output
        losses = output.token_loss.clone()
        losses[hit] = float("nan")
        return dataclasses.replace(
            output, loss_sum=output.loss_sum * float("nan"), token_loss=losses
        )

    monkeypatch.setattr(StepLoss, "__call__", call)


def test_an_incident_holds_text_and_the_loss_of_each_target(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {3})
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError) as caught:
        start(folder, run)
    found = json.loads((run / "incident-3" / "rows.json").read_text())
    assert found["loss"] == "nan"
    worst, *others = found["rows"]
    assert worst["loss"] == "nan"
    assert f"{worst['row']} (loss nan)" in str(caught.value)
    assert len(others) == 3
    for row in found["rows"]:
        assert "You add numbers" in row["text"][0]
        assert "".join(target["text"] for target in row["targets"]).endswith("<|im_end|>")
        losses = [target["loss"] for target in row["targets"]]
        if row is worst:
            assert set(losses) == {"nan"}
            continue
        assert sum(target["loss"] * target["weight"] for target in row["targets"]) == pytest.approx(
            row["loss_sum"], rel=1e-5
        )
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_skipped_step_changes_nothing_and_is_counted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        poisoned(patch, {3, 5})
        done = start(folder, tmp_path / "run", train={"non_finite": "skip"})
    states = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-{n}" / "optimizer.safetensors")
        for n in (2, 3, 4)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])
    records = list(read_records(tmp_path / "run" / "metrics.jsonl"))
    assert [r["step"] for r in records if r.get("event") == "skipped"] == [3, 5]
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 4, 6, 7, 8]
    assert done.metrics["skipped_steps"] == 2
    start(folder, tmp_path / "clean")
    assert any(
        not torch.equal(weights(tmp_path / "run")[n], weights(tmp_path / "clean")[n])
        for n in weights(tmp_path / "clean")
    )


def test_a_resume_over_skipped_steps_is_bitwise(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {3, 6})
    run = tmp_path / "run"
    start(folder, run, train={"non_finite": "skip"})
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "model")
    for step in (4, 5, 6, 7, 8):
        shutil.rmtree(again / "checkpoints" / f"step-{step}")
    resumed = resume(again, progress=False)
    assert_same(run, again)
    assert resumed.metrics["skipped_steps"] == 2


def test_too_many_skips_in_a_row_stop_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        guard_module.Guard.__init__,
        "__kwdefaults__",
        {**guard_module.Guard.__init__.__kwdefaults__, "patience": 3},
    )
    poisoned(monkeypatch, {1, 2, 4, 5, 6}, document=0)
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        start(folder, tmp_path / "run", train={"non_finite": "skip"})
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in records if r.get("event") == "skipped"] == [1, 2, 4, 5]


def test_a_full_disk_does_not_hide_what_happened(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, {2})
    own = Path.write_text

    def full(self: Path, *given, **named):
        if self.name == "rows.json":
            raise OSError(28, "No space left on device")
        return own(self, *given, **named)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(NonFiniteError, match="step 2"):
        start(folder, tmp_path / "run")


def test_spikes_are_multiples_of_the_running_median() -> None:
    spikes = Spikes({"loss": 3.0, "grad_norm": None})
    for _ in range(LEAST):
        assert not spikes.see({"loss": 2.0, "grad_norm": 1.0})
    assert not spikes.see({"loss": 6.0, "grad_norm": 50.0})
    (found,) = spikes.see({"loss": 6.1, "grad_norm": 50.0})
    assert (found.what, found.value, found.median) == ("loss", 6.1, 2.0)
    other = Spikes({"loss": 3.0, "grad_norm": None})
    other.restore(spikes.tensors())
    assert other.see({"loss": 7.0, "grad_norm": 1.0}) == spikes.see({"loss": 7.0, "grad_norm": 1.0})
    for _ in range(WINDOW):
        spikes.see({"loss": 7.0, "grad_norm": 1.0})
    assert not spikes.see({"loss": 7.0, "grad_norm": 1.0})


def test_too_few_steps_have_no_spike() -> None:
    spikes = Spikes({"loss": 2.0, "grad_norm": 2.0})
    for _ in range(LEAST - 1):
        spikes.see({"loss": 1.0, "grad_norm": 1.0})
    assert not spikes.see({"loss": 99.0, "grad_norm": 99.0})


def garbled(folder: Path, place: Path) -> Path:
    """The rows with one whose answer the model can't expect, far from the others."""
    place.mkdir()
    shutil.copytree(folder / "model", place / "model")
    rows = chat_rows(120)
    rows[97]["messages"][2]["content"] = "\u20ac\u00a5\u00df" * 40
    write_jsonl(place / "rows.jsonl", rows)
    return place


@pytest.mark.parametrize(("what", "factor"), [("spike_loss", 1.5), ("spike_grad_norm", 1.2)])
def test_a_spike_is_attributed_to_its_row_under_packing(
    folder: Path, tmp_path: Path, what: str, factor: float
) -> None:
    given = garbled(folder, tmp_path / "given")
    run = tmp_path / "run"
    done = start(
        given, run, train={"epochs": 1}, checkpoint={"every": None}, log={what: factor},
        shuffle=False, optim={"lr": 3e-3},
    )  # fmt: skip
    records = list(read_records(run / "metrics.jsonl"))
    at = {r["step"]: r for r in records if r.get("event") == "spike"}
    assert 25 in at, [(r["step"], r["loss"], r["grad_norm"]) for r in records if "loss" in r]
    assert at[25]["rows"][0].endswith("rows.jsonl:97")
    incident = json.loads((run / at[25]["incident"] / "rows.json").read_text())
    assert incident["spikes"][0]["what"] == what.removeprefix("spike_")
    assert incident["rows"][0]["row"].endswith("rows.jsonl:97")
    assert "\u20ac\u00a5" in incident["rows"][0]["text"][0]
    assert done.metrics["spikes"] == len(at)
    plain = start(
        given, tmp_path / "plain", train={"epochs": 1}, checkpoint={"every": None},
        shuffle=False, optim={"lr": 3e-3},
    )  # fmt: skip
    assert "spikes" not in plain.metrics
    assert not list((tmp_path / "plain").glob("incident-*"))
    assert_same(run, tmp_path / "plain")


def test_a_spike_stops_where_asked_and_a_resume_may_go_on(folder: Path, tmp_path: Path) -> None:
    given = garbled(folder, tmp_path / "given")
    options = dict(train={"epochs": 1}, checkpoint={"every": 1}, shuffle=False, optim={"lr": 3e-3})
    run = tmp_path / "run"
    with pytest.raises(RunError, match=r"rows\.jsonl:97") as caught:
        start(given, run, log={"spike_loss": 1.5, "on_spike": "stop"}, **options)
    assert caught.value.exit_code == 1
    assert not (run / "checkpoints" / "step-25").exists()
    with pytest.raises(RunError):
        resume(run, progress=False)
    resume(run, overrides=["log.on_spike=report"], progress=False)
    start(given, tmp_path / "plain", **options)
    assert_same(run, tmp_path / "plain")
