"""Checkpoints that are written while the run goes on: of the moment they were begun, one at a time,
waited for where the run ends, and never lost in silence.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tunesmith.checkpoint import manager
from tunesmith.checkpoint.folder import find_damage, load_checkpoint
from tunesmith.checkpoint.snapshot import Snapshot
from tunesmith.checkpoint.writer_thread import AbandonedWriteError, BackgroundWriter, WriterState
from tunesmith.errors import CheckpointError, InterruptedRun, RunError
from tunesmith.run import resume, train
from tunesmith.train import trainer as trainer_module

STEPS = 8
PATIENCE = 30.0  # seconds that a writer waits for a step that must come


@pytest.fixture(scope="module", autouse=True)
def _settings_of_torch():
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def start(place: Path, out: Path, *, every: int | None = 4, **checkpoint):
    return train(
        model=str(place / "model"), data=str(place / "rows.jsonl"), out=out, progress=False,
        batch={"documents": 2}, train={"steps": STEPS}, optim={"lr": 0.01},
        checkpoint={"every": every, "keep": 9, **checkpoint},
    )  # fmt: skip


@pytest.fixture(scope="module")
def at_once(eight_chats: Path) -> Path:
    """A run that writes its checkpoints between steps."""
    start(eight_chats, eight_chats / "at-once", background=False)
    return eight_chats / "at-once"


class Pace:
    """Lets the writing of a step's checkpoint wait until another step has been taken."""

    def __init__(self, patch: pytest.MonkeyPatch, *, of: int, until: int) -> None:
        self.of, self.until = of, until
        self.reached = threading.Event()
        self.taken = 0
        self.in_time: bool | None = None
        self._complete, self._step = manager.complete_checkpoint, trainer_module.train_step
        patch.setattr(manager, "complete_checkpoint", self.complete)
        patch.setattr(trainer_module, "train_step", self.step)

    def complete(self, run: Path, state, **options):
        if state.step == self.of:
            self.in_time = self.reached.wait(PATIENCE)
            assert not (run / "checkpoints" / f"step-{self.of}").exists()
        return self._complete(run, state, **options)

    def step(self, *args, **options):
        result = self._step(*args, **options)
        self.taken += 1
        if self.taken == self.until:
            self.after()
        return result

    def after(self) -> None:
        self.reached.set()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def events(run: Path) -> list[tuple[str, int]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["event"], line["step"]) for line in lines if line["kind"] == "event"]


@pytest.fixture(scope="module")
def beside(eight_chats: Path) -> tuple[Path, Pace]:
    """A run whose checkpoint of step 4 is written only after step 6."""
    with pytest.MonkeyPatch.context() as patch:
        pace = Pace(patch, of=4, until=6)
        start(eight_chats, eight_chats / "beside", background=True)
    return eight_chats / "beside", pace


def test_steps_go_on_while_a_checkpoint_is_written(beside) -> None:
    run, pace = beside
    assert pace.in_time
    assert events(run) == [("checkpoint", 4), ("checkpoint", 8)]


def test_what_is_written_is_of_the_step_it_is_named_by(beside, at_once: Path) -> None:
    run, _ = beside
    found, wanted = (load_checkpoint(r / "checkpoints" / "step-4") for r in (run, at_once))
    later = load_checkpoint(at_once / "checkpoints" / "step-8")
    assert same(dict(found.optimizer), dict(wanted.optimizer))
    assert same(dict(found.model), dict(wanted.model))
    assert not same(dict(found.optimizer), dict(later.optimizer))
    assert found.rng.python == wanted.rng.python
    assert find_damage(run / "checkpoints" / "step-4") is None


def test_a_run_goes_on_from_it_to_the_bit(beside, at_once: Path, tmp_path: Path) -> None:
    run, _ = beside
    again = shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "step-8")
    shutil.rmtree(again / "model")
    resume(again, progress=False)
    assert same(weights(again), weights(at_once))


def test_one_is_written_at_a_time(
    eight_chats: Path, at_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, active, most, order = manager.complete_checkpoint, 0, 0, []

    def slow(run: Path, state, **options):
        nonlocal active, most
        active += 1
        most = max(most, active)
        threading.Event().wait(0.05)
        order.append(state.step)
        found = complete(run, state, **options)
        active -= 1
        return found

    monkeypatch.setattr(manager, "complete_checkpoint", slow)
    start(eight_chats, tmp_path / "run", every=1)
    assert (most, order) == (1, list(range(1, STEPS + 1)))
    for step in order:
        assert find_damage(tmp_path / "run" / "checkpoints" / f"step-{step}") is None
    assert same(weights(tmp_path / "run"), weights(at_once))


def test_a_write_that_fails_ends_the_run(
    eight_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = manager.complete_checkpoint

    def failing(run: Path, state, **options):
        if state.step == 4:
            raise CheckpointError("the disk is gone")
        return complete(run, state, **options)

    monkeypatch.setattr(manager, "complete_checkpoint", failing)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        start(eight_chats, tmp_path / "run", every=2, background=True)
    assert events(tmp_path / "run") == [("checkpoint", 2)]
    monkeypatch.undo()
    resume(tmp_path / "run", progress=False)
    assert events(tmp_path / "run")[-1] == ("checkpoint", 8)


class ErrorAt(Pace):
    """Another error comes while the checkpoint is written."""

    error: BaseException = RunError("something else")

    def after(self) -> None:
        super().after()
        raise self.error


def test_an_error_elsewhere_leaves_the_checkpoint_whole(
    eight_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ErrorAt(monkeypatch, of=4, until=6)
    with pytest.raises(RunError, match="something else"):
        start(eight_chats, tmp_path / "run", background=True)
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-4") is None
    assert events(tmp_path / "run") == [("checkpoint", 4)]


def test_two_errors_are_both_told(
    eight_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = ErrorAt(monkeypatch, of=4, until=6)

    def failing(run: Path, state, **options):
        pace.reached.wait(PATIENCE)
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr(manager, "complete_checkpoint", failing)
    with pytest.raises(RunError, match="something else"):
        start(eight_chats, tmp_path / "run", background=True)
    assert events(tmp_path / "run") == [("checkpoint_failed", 4)]
    assert "the disk is gone" in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_an_interrupt_waits_for_nothing(
    eight_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a second Ctrl-C does."""
    ErrorAt(monkeypatch, of=4, until=6).error = KeyboardInterrupt()
    begun = threading.Event()
    complete = manager.complete_checkpoint

    def unwanted(run: Path, state, *, between, **options):
        begun.set()

        def left() -> None:
            while True:  # until it is told to leave off
                between()
                threading.Event().wait(0.01)

        return complete(run, state, between=left, **options)

    monkeypatch.setattr(manager, "complete_checkpoint", unwanted)
    with pytest.raises(KeyboardInterrupt):
        start(eight_chats, tmp_path / "run", background=True)
    assert begun.is_set()
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())
    assert not (tmp_path / "run" / "checkpoints" / "step-4").exists()
    monkeypatch.undo()
    resume(tmp_path / "run", progress=False)


def test_a_signal_waits_for_the_writing(
    eight_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, step = manager.complete_checkpoint, trainer_module.train_step

    def slow(*args, **options):
        threading.Event().wait(0.3)
        return complete(*args, **options)

    def stopped(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **options)

    monkeypatch.setattr(manager, "complete_checkpoint", slow)
    monkeypatch.setattr(trainer_module, "train_step", stopped)
    with pytest.raises(InterruptedRun):
        start(eight_chats, tmp_path / "run", background=True)
    assert find_damage(tmp_path / "run" / "checkpoints" / "step-1") is None


@pytest.mark.parametrize(("asked", "waits"), [("auto", True), (True, False)])
def test_without_memory_for_a_copy_it_is_written_between_steps(
    eight_chats: Path,
    at_once: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | bool,
    waits: bool,
) -> None:
    monkeypatch.setattr(manager, "free_memory", lambda _: 1000)
    run = tmp_path / "run"
    start(eight_chats, run, background=asked)
    told = [("checkpoint_waits", 0)] if waits else []
    assert [event for event in events(run) if event[0] != "checkpoint"] == told
    assert same(weights(run), weights(at_once))


def test_a_snapshot_stays_as_it_was_and_uses_its_memory_again() -> None:
    tensor, grown = torch.arange(4.0), torch.zeros(2)
    taken = Snapshot()
    first = taken.take([("a", tensor), ("b", grown)])
    tensor += 1
    assert first["a"].tolist() == [0, 1, 2, 3]
    second = taken.take([("a", tensor), ("b", torch.ones(3))])
    assert second["a"].tolist() == [1, 2, 3, 4]
    assert second["a"].data_ptr() == first["a"].data_ptr()
    assert second["b"].tolist() == [1, 1, 1]
    third = taken.take([("b", torch.ones(2, 3))])
    assert third["b"].shape == (2, 3)
    assert third["b"].data_ptr() == second["b"].data_ptr()  # it had room to grow
    other_kind = taken.take([("b", torch.ones(2, dtype=torch.int8))])
    assert other_kind["b"].dtype == torch.int8


def test_work_beside_hands_over_its_result_or_its_error_once() -> None:
    work, go = BackgroundWriter(), threading.Event()
    assert work.state == WriterState.DONE
    work.start(lambda: go.wait(PATIENCE) and 7)
    assert work.state == WriterState.BUSY
    go.set()
    assert work.result() == 7
    work.start(lambda: 1 / 0)
    work.join()
    assert work.state == WriterState.FAILED
    with pytest.raises(ZeroDivisionError):
        work.result()
    assert work.state == WriterState.DONE
    work.abandon()
    with pytest.raises(AbandonedWriteError):
        work.between()


def test_work_beside_has_one_thread_that_ends_with_it() -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread not in before]

    before = threading.enumerate()
    work = BackgroundWriter()
    seen = set()
    for _ in range(3):
        work.start(threading.get_ident)
        seen.add(work.result())
    assert len(seen) == 1
    (thread,) = threads()
    assert seen == {thread.ident}
    del work
    thread.join(PATIENCE)
    assert not threads()


def test_work_that_is_done_is_not_held() -> None:
    work = BackgroundWriter()
    held = torch.zeros(1)
    gone = weakref.ref(held)
    work.start(held.sum)
    work.join()
    del held
    work.start(lambda: None)
    work.join()
    assert gone() is None
