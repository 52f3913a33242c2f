from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys

import pytest

from tunesmith.errors import InputError, RunError
from tunesmith.storage.atomic import read_json, write_json, write_text
from tunesmith.storage.run_folder import is_run, open_run


def make_run(path):
    path.mkdir()
    (path / "recipe.yaml").write_text("model: m\n")
    (path / "machine.json").write_text("{}")
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "x").write_text("x")
    return path


def contents(path):
    return sorted(entry.name for entry in path.iterdir() if entry.name != ".lock")


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_starts(tmp_path, resume, exists):
    out = tmp_path / "a" / "b"
    if exists:
        out.mkdir(parents=True)
    with open_run(out, model_name="m", resume=resume) as run:
        assert run.path == out
        assert not run.resumed
        assert out.is_dir()


def test_a_run_without_out_is_named_by_time_and_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        with open_run(None, model_name="org/Some Model-1.5B") as run:
            names.append(str(run.path))
    assert len(set(names)) == 3
    assert re.fullmatch(r"runs/\d{8}-\d{6}-Some-Model-1\.5B", names[0])


def test_a_folder_with_contents_is_refused(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="not empty"):
            open_run(tmp_path, model_name="m", **options)
    assert contents(tmp_path) == ["precious.txt"]


def test_a_run_is_gone_on_with_or_replaced_only_when_asked(tmp_path):
    path = make_run(tmp_path / "run")
    with pytest.raises(InputError) as raised:
        open_run(path, model_name="m")
    assert "--resume" in raised.value.hint
    assert "--overwrite" in raised.value.hint
    with open_run(path, model_name="m", resume=True) as run:
        assert run.resumed
    assert contents(path) == ["checkpoints", "machine.json", "recipe.yaml"]
    with open_run(path, model_name="m", overwrite=True) as run:
        assert not run.resumed
        assert is_run(path)
        run.clear()
    assert contents(path) == []


def test_overwriting_spares_what_the_new_run_needs(tmp_path):
    path = make_run(tmp_path / "run")
    with (
        open_run(path, model_name="m", overwrite=True) as run,
        pytest.raises(InputError, match="would delete"),
    ):
        run.clear([tmp_path, path / "model"])
    assert is_run(path)


def test_overwriting_does_not_follow_links(tmp_path):
    path = make_run(tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("x")
    (path / "link").symlink_to(other)
    with open_run(path, model_name="m", overwrite=True) as run:
        run.clear()
    assert contents(path) == []
    assert (other / "kept").exists()


def test_a_deletion_cut_short_leaves_a_run(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run")

    def fail(*args, **options):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(shutil, "rmtree", fail)
    with (
        open_run(path, model_name="m", overwrite=True) as run,
        pytest.raises(RunError, match="can't be deleted"),
    ):
        run.clear()
    assert is_run(path)


def test_what_can_not_be_a_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="can't be created"):
        open_run(tmp_path / "file", model_name="m")
    with pytest.raises(InputError, match="can't be created"):
        open_run(tmp_path / "file" / "below", model_name="m")


CONTENDER = """
import sys
from pathlib import Path
from tunesmith.errors import InputError
from tunesmith.storage.run_folder import open_run
try:
    open_run(Path(sys.argv[1]), model_name="m", overwrite=True)
except InputError as error:
    sys.exit(error.message)
"""


def test_two_processes_can_not_train_in_one_folder(tmp_path):
    path = make_run(tmp_path / "run")

    def contend():
        command = [sys.executable, "-c", CONTENDER, str(path)]
        return subprocess.run(command, capture_output=True, text=True)

    with open_run(path, model_name="m", resume=True):
        refused = contend()
        assert "another process" in refused.stderr
        assert is_run(path)
    assert contend().returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_holds_nor_lets_go(tmp_path):
    path = make_run(tmp_path / "run")
    run = open_run(path, model_name="m", resume=True)
    child = os.fork()
    if child == 0:
        other = os.open(path / "machine.json", os.O_RDWR)  # may get the number of the lock's
        run.close()
        os._exit(0 if os.fstat(other).st_size == 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with pytest.raises(InputError, match=f"process {os.getpid()} on"):
        open_run(path, model_name="m", resume=True)
    run.close()
    open_run(path, model_name="m", resume=True).close()


def test_json_is_replaced_in_one_go(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, "ü"]})
    assert read_json(path) == {"a": [1, "ü"]}

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError) as raised:
        write_json(path, {"a": 2})
    assert "free some space" in raised.value.hint
    assert read_json(path) == {"a": [1, "ü"]}
    assert contents(tmp_path) == ["x.json"]


def test_json_never_holds_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert contents(tmp_path) == []


def test_reading_says_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "x.json")
    write_text(tmp_path / "x.json", "{")
    with pytest.raises(InputError, match="not JSON"):
        read_json(tmp_path / "x.json")
