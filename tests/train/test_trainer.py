"""The loop from outside: signals, a resume with other device settings, moved data, a full disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny import CHATML, chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.errors import InterruptedRun, RunError
from tunesmith.run import resume, train
from tunesmith.storage.run_folder import is_run
from tunesmith.train import trainer as trainer_module

SECTIONS = {"batch": {"documents": 4}, "train": {"epochs": 2}, "checkpoint": {"every": 1}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its rows."""
    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model")
    write_jsonl(place / "rows.jsonl", chat_rows(16))
    return place


def start(folder: Path, out: Path, **sections):
    return train(
        model={"name": str(folder / "model"), "dtype": "float32"},
        data=str(folder / "rows.jsonl"),
        out=out,
        progress=False,
        **{**SECTIONS, **sections},
    )


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def assert_same(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    start(folder, folder / "undisturbed")
    return folder / "undisturbed"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_rest_is_the_same(
    folder: Path, undisturbed: Path, tmp_path: Path, number: int, code: int
) -> None:
    def interrupt_after_two_steps(step_function):
        def wrapped(*args, **keywords):
            result = step_function(*args, **keywords)
            wrapped.count += 1
            if wrapped.count == 2:
                os.kill(os.getpid(), number)
            return result

        wrapped.count = 0
        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            trainer_module, "train_step", interrupt_after_two_steps(trainer_module.train_step)
        )
        with pytest.raises(InterruptedRun) as caught:
            start(folder, tmp_path / "run", checkpoint={"every": None})
    assert caught.value.exit_code == code
    assert "resume" in (caught.value.hint or "")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-2"]
    resume(tmp_path / "run", progress=False)
    assert_same(tmp_path / "run", undisturbed)


def test_the_command_line_exits_with_the_signals_code(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [
        "train",
        "--model",
        folder / "model",
        "--data",
        folder / "rows.jsonl",
        "--out",
        run,
    ]
    changes = ["batch.documents=1", "train.epochs=200", "checkpoint.every=null"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tunesmith", *map(str, arguments), *changes],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"train"') > 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert out == ""
    assert "Traceback" not in err
    assert f"tunesmith resume {run}" in err
    assert list((run / "checkpoints").glob("step-*"))


def test_a_run_off_the_main_thread_needs_no_signals(folder: Path, tmp_path: Path) -> None:
    done: list[object] = []
    thread = threading.Thread(target=lambda: done.append(start(folder, tmp_path / "run")))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_a_resume_with_other_micro_tokens_is_said_to_be_within_rounding(
    folder: Path, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("model", "rows.parquet", "report.html"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    shutil.rmtree(newest)
    assert command(["resume", str(run), "device.micro_tokens=64"]) == 0
    said = capsys.readouterr().err
    assert "within rounding" in said
    assert "micro_tokens was 1024 and is 64" in said
    for name, tensor in weights(run).items():
        assert torch.allclose(tensor, weights(undisturbed)[name], atol=1e-6)


def test_resume_starts_in_an_empty_folder_and_overwrite_replaces_a_run(
    folder: Path, undisturbed: Path, tmp_path: Path
) -> None:
    start(folder, tmp_path / "run", resume=True)
    assert_same(tmp_path / "run", undisturbed)
    (tmp_path / "run" / "left.txt").write_text("from before")
    start(folder, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "left.txt").exists()
    assert_same(tmp_path / "run", undisturbed)


def test_a_run_repeats_to_the_bit_where_the_data_has_moved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    shutil.copy(folder / "rows.jsonl", first / "rows.jsonl")
    monkeypatch.chdir(first)
    train(model=str(folder / "model"), data="rows.jsonl", out="run", progress=False, **SECTIONS)
    shutil.move(first / "rows.jsonl", second / "rows.jsonl")
    monkeypatch.chdir(second)
    assert command(["train", str(first / "run" / "recipe.yaml"), "--out", "again"]) == 0
    assert_same(first / "run", second / "again")


def test_a_run_with_a_template_of_a_file_can_be_run_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "own").mkdir(parents=True)
    second.mkdir()
    text = CHATML.replace("<|im_start|>", "<|im_start|>the ")
    (first / "own" / "chat.jinja").write_text(text)
    monkeypatch.chdir(first)
    data = {"train": str(folder / "rows.jsonl"), "template": "own/chat.jinja"}
    recipe = {**SECTIONS, "model": str(folder / "model"), "data": data}
    train(recipe, out="run", progress=False)
    assert str(first / "own" / "chat.jinja") in (first / "run" / "recipe.yaml").read_text()
    train(recipe, out="run", progress=False, resume=True)
    monkeypatch.chdir(second)
    assert command(["train", str(first / "run" / "recipe.yaml"), "--out", "again"]) == 0
    assert_same(first / "run", second / "again")
    assert (second / "again" / "model" / "chat_template.jinja").read_text() == text


def test_a_full_disk_at_a_save_leaves_the_earlier_checkpoint(
    folder: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, synced = tmp_path / "run", os.fsync

    def full(descriptor: int) -> None:
        if (run / "checkpoints" / "step-2").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError) as caught:
        start(folder, run)
    assert caught.value.exit_code == 1
    assert "full" in caught.value.message
    monkeypatch.undo()
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert (run / "checkpoints" / "step-2").is_dir()
    resume(run, progress=False)
    assert_same(run, undisturbed)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("out")])
def test_out_of_memory_says_what_to_lower(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(trainer_module, "train_step", too_much)
    with pytest.raises(RunError) as caught:
        start(folder, tmp_path / "run")
    assert "micro_tokens" in str(caught.value)
    assert is_run(tmp_path / "run")


def test_weights_that_are_not_numbers_stop_the_run_before_anything_is_learned(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    broken = tmp_path / "model"
    shutil.copytree(folder / "model", broken)
    tensors = load_file(broken / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    code = command(
        ["train", "--model", str(broken), "--data", str(folder / "rows.jsonl"),
         "--out", str(tmp_path / "run")]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert "not a number" in captured.err
    assert "Traceback" not in captured.err


def test_metrics_have_one_record_a_step_and_name_their_units(undisturbed: Path) -> None:
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["epoch"] == 2.0
    for record in steps:
        assert record["computed_tokens"] < record["tokens"]  # the system prompt is shared
        assert record["target_tokens"] > 0
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["seconds"])
