from __future__ import annotations

import json
import logging
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tunesmith
from tunesmith.errors import InputError, RunError
from tunesmith.metrics.environment import machine_record
from tunesmith.metrics.records import JsonlSink, read_records
from tunesmith.metrics.trackers import TRACKERS, GuardedSink, TrackedRun, open_tracker, scalars


def train(step):
    return {"kind": "train", "step": step, "loss": 1.0 / step, "tokens": 10 * step}


def fill(path, steps):
    sink = JsonlSink(path)
    for step in steps:
        sink.write(train(step))
        if step % 3 == 0:
            sink.write({"kind": "eval", "step": step, "set": "dev", "nll": 0.5})
    sink.close()


def test_records_come_back_by_kind(tmp_path):
    path = tmp_path / "metrics.jsonl"
    fill(path, range(1, 8))
    assert [r["step"] for r in read_records(path, kind="train")] == list(range(1, 8))
    assert [r["step"] for r in read_records(path, kind="eval")] == [3, 6]
    assert len(list(read_records(path))) == 9
    assert next(read_records(path)) == train(1)


def test_each_record_is_in_the_file_at_once(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.write(train(1))
    assert list(read_records(tmp_path / "m.jsonl")) == [train(1)]
    sink.close()
    sink.close()


def test_values_json_lacks(tmp_path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    odd = {
        "nan": float("nan"),
        "inf": np.float32("inf"),
        "numpy": np.int64(3),
        "torch": torch.tensor(0.5),
        "nested": [{"x": (1, None, True)}],
        "path": tmp_path,
    }
    sink.write(odd)
    sink.close()
    (found,) = read_records(tmp_path / "m.jsonl")
    assert found == {
        "nan": None,
        "inf": None,
        "numpy": 3,
        "torch": 0.5,
        "nested": [{"x": [1, None, True]}],
        "path": str(tmp_path),
    }


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st', "\x00\x00\n"])
def test_a_resumed_file_is_what_it_was_at_the_checkpoint(tmp_path, torn):
    path, wanted = tmp_path / "m.jsonl", tmp_path / "wanted.jsonl"
    fill(wanted, range(1, 7))
    fill(path, range(1, 10))
    with open(path, "a") as file:
        file.write(torn)
    sink = JsonlSink(path, after_step=6)
    assert path.read_bytes() == wanted.read_bytes()
    sink.write(train(7))
    sink.close()
    assert [r["step"] for r in read_records(path, kind="train")] == list(range(1, 8))


def test_a_file_torn_before_the_checkpoint_keeps_its_whole_lines(tmp_path):
    path = tmp_path / "m.jsonl"
    fill(path, [1, 2])
    with open(path, "a") as file:
        file.write('{"kind": "tr')
    JsonlSink(path, after_step=5).close()
    assert [r["step"] for r in read_records(path)] == [1, 2]


def test_reading_says_which_line_is_wrong(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train"}\n[]\n')
    with pytest.raises(InputError, match="line 2"):
        list(read_records(path))
    path.write_text('{"kind": "train"}\nno\n')
    with pytest.raises(InputError, match="line 2"):
        list(read_records(path))
    with pytest.raises(InputError):
        list(read_records(tmp_path / "absent.jsonl"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_an_error_with_the_files_name(tmp_path):
    path = tmp_path / "m.jsonl"
    path.symlink_to("/dev/full")
    sink = JsonlSink(path)
    with pytest.raises(RunError, match=r"m\.jsonl"):
        sink.write(train(1))


def test_machine_record_is_json_and_names_what_bits_depend_on():
    record = json.loads(json.dumps(machine_record()))
    assert record["versions"]["tunesmith"] == tunesmith.__version__
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "numpy"} <= record["versions"].keys()
    assert record["threads"] == torch.get_num_threads()
    assert record["command"] == sys.argv


def test_scalars_are_named_by_kind_and_set():
    assert scalars(train(2)) == {"train/loss": 0.5, "train/tokens": 20.0}
    record = {"kind": "eval", "step": 1, "set": "dev", "nll": 2, "hash": "ab", "done": True}
    assert scalars(record) == {"eval/dev/nll": 2.0}
    assert scalars({"kind": "event", "step": 1, "seconds": 3}) == {}
    assert scalars({"kind": "train", "step": 1, "loss": None}) == {}


def tracked(tmp_path, **options):
    folder = tmp_path / "run-7"
    folder.mkdir(exist_ok=True)
    return TrackedRun(folder, "project", {"optim": {"lr": 1e-4}}, **options)


def test_tensorboard_for_real(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = open_tracker("tensorboard", tracked(tmp_path))
    for step in (1, 2):
        sink.write(train(step))
    sink.write({"kind": "event", "step": 2, "message": "no number"})
    sink.close()
    events = EventAccumulator(str(tmp_path / "run-7" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


class Recorder:
    """Stands for a tracker's module and its run: keeps every call."""

    def __init__(self):
        self.calls = []
        self.info = SimpleNamespace(run_id="run-id")

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args, **options):
            self.calls.append((name, args, options))
            return self

        return call

    def named(self, name):
        return [(args, options) for call, args, options in self.calls if call == name]


def use(name, tmp_path, monkeypatch, **options):
    module = Recorder()
    monkeypatch.setitem(sys.modules, name, module)
    sink = open_tracker(name, tracked(tmp_path, **options))
    sink.write(train(2))
    sink.close()
    return module


NUMBERS = {"train/loss": 0.5, "train/tokens": 20.0}


def test_wandb_goes_on_under_its_id(tmp_path, monkeypatch):
    first = use("wandb", tmp_path, monkeypatch)
    again = use("wandb", tmp_path, monkeypatch, resumed=True)
    anew = use("wandb", tmp_path, monkeypatch)
    (start,) = (options for _, options in first.named("init"))
    assert (start["project"], start["name"]) == ("project", "run-7")
    assert start["config"] == {"optim": {"lr": 1e-4}}
    ids = [module.named("init")[0][1]["id"] for module in (first, again, anew)]
    assert ids[0] == ids[1] != ids[2]
    assert first.named("log") == [((NUMBERS,), {"step": 2})]
    assert len(first.named("finish")) == 1


def test_trackio(tmp_path, monkeypatch):
    module = use("trackio", tmp_path, monkeypatch)
    assert module.named("init")[0][1]["name"] == "run-7"
    assert module.named("log") == [((NUMBERS,), {"step": 2})]
    assert len(module.named("finish")) == 1


def test_mlflow_goes_on_under_its_id(tmp_path, monkeypatch):
    first = use("mlflow", tmp_path, monkeypatch)
    again = use("mlflow", tmp_path, monkeypatch, resumed=True)
    assert first.named("start_run") == [((), {"run_name": "run-7"})]
    assert again.named("start_run") == [((), {"run_id": "run-id"})]
    assert first.named("log_metrics") == [((NUMBERS,), {"step": 2})]
    assert len(first.named("end_run")) == 1


@pytest.mark.parametrize("name", TRACKERS)
def test_one_that_is_not_installed_is_an_input_error(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, TRACKERS[name][0], None)
    with pytest.raises(InputError) as raised:
        open_tracker(name, tracked(tmp_path))
    assert "pip install 'tunesmith[logging]'" in raised.value.hint
    assert raised.value.exit_code == 2


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_one_that_fails_warns_once_and_stops_nothing(tmp_path, monkeypatch, caplog, broken):
    module = Recorder()

    def fail(*args, **options):
        raise ConnectionError("no network")

    setattr(module, broken, fail)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with caplog.at_level(logging.WARNING):
        sink = open_tracker("wandb", tracked(tmp_path))
        for step in (1, 2, 3):
            sink.write(train(step))
        sink.close()
    (warning,) = caplog.records
    assert "wandb" in warning.getMessage()
    assert "no network" in warning.getMessage()
    assert len(module.named("log")) == (3 if broken == "finish" else 0)


def test_a_guard_lets_interrupts_through():
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuardedSink("x", stop)
