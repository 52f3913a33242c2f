"""The run folder: held by another process, read-only, on a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Place, assert_clean, assert_same_run

STUCK = """
import os, threading, time
from tunesmith.train.trainer import Trainer
learn = Trainer._learn
def stuck(self, number, lr):
    if number == 3:
        {first}
        threading.Event().wait()
    return learn(self, number, lr)
Trainer._learn = stuck
"""
WITHOUT_POWERS = """
import ctypes
header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, none) == 0  # root without powers is bound by modes
"""
BEFORE_SAVE = """
import os, resource
from pathlib import Path
from tunesmith.train.trainer import Trainer
save = Trainer.save
def prepared(self):
    if self.step == 3:
        self._wait_for_writer()
        {first}
    save(self)
Trainer.save = prepared
"""


def newest(run: Path) -> str:
    return max(path.name for path in (run / "checkpoints").iterdir())


@pytest.fixture
def writable_again(tmp_path: Path) -> Iterator[None]:
    yield
    for path in [tmp_path, *tmp_path.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)


def test_a_second_run_is_locked_out_until_the_first_is_gone(
    place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    at_once = ["checkpoint.background=false"]
    first = place.start(run, at_once, prelude=STUCK.format(first="pass"))
    try:
        said = '"event": "checkpoint", "step": 3}\n'  # written once the folder is there
        metrics = run / "metrics.jsonl"
        first.until(lambda: metrics.exists() and said in metrics.read_text())
        before = metrics.read_bytes()
        for second in (place.run(run), place.resume(run)):
            assert_clean(second, code=2)
            assert f"process {first.pid} on {socket.gethostname()}" in second.said
        assert metrics.read_bytes() == before
    finally:
        first.kill()
    assert first.wait() == -9
    done = place.run(run)
    assert done.code == 0, done.said
    assert_same_run(run, undisturbed)


def test_a_child_of_a_killed_run_holds_nothing(place: Place, tmp_path: Path) -> None:
    run, child = tmp_path / "run", tmp_path / "child"
    first = f"pid = os.fork()\n        pid and open({str(child)!r}, 'w').write(str(pid))"
    killed = place.start(run, prelude=STUCK.format(first=first))
    killed.until(lambda: child.exists() and child.read_text() != "")
    killed.kill()
    assert killed.wait() == -9
    try:
        assert place.resume(run).code == 0
    finally:
        os.kill(int(child.read_text()), signal.SIGKILL)


def test_a_holder_on_another_host_is_named(place: Place, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / ".lock").write_text('{"pid": 7, "host": "elsewhere"}')
    done = place.resume(run)
    assert done.code == 0, done.said
    assert "process 7 on elsewhere" in done.said
    assert (run / ".lock").read_bytes() == b""


@pytest.mark.usefixtures("writable_again")
def test_a_folder_that_can_not_be_written_in(
    place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    new = place.run(closed / "run", prelude=WITHOUT_POWERS)
    assert_clean(new, code=2)
    assert "can't be created: Permission denied" in new.said
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for path in [run, *run.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    old = place.resume(run, prelude=WITHOUT_POWERS)
    assert_clean(old, code=2)
    assert "can't be written to: Permission denied" in old.said


@pytest.mark.usefixtures("writable_again")
def test_a_folder_that_becomes_read_only(place: Place, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = '(self.folder / "checkpoints").chmod(0o555)'
    failed = place.run(run, prelude=WITHOUT_POWERS + BEFORE_SAVE.format(first=first))
    assert_clean(failed, code=1)
    assert "step-2 is intact" in failed.said
    (run / "checkpoints").chmod(0o755)
    assert place.resume(run).code == 0
    assert_same_run(run, undisturbed)


def test_a_file_that_may_not_grow(place: Place, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    failed = place.run(run, prelude=BEFORE_SAVE.format(first=first))
    assert_clean(failed, code=1)
    assert "File too large; step-2 is intact" in failed.said
    assert newest(run) == "step-2"
    assert place.resume(run).code == 0
    assert_same_run(run, undisturbed)


@pytest.mark.parametrize("part", ["model", "report"])
def test_a_result_that_can_not_be_written(
    place: Place, undisturbed: Path, tmp_path: Path, part: str
) -> None:
    run = tmp_path / "run"
    prelude = f"""
import os, resource
import tunesmith.run.result
write = tunesmith.run.result.write_{part}
def limited(*args, **options):
    size = os.fstat(2).st_size + 700  # what the error takes on standard error, a file here
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return write(*args, **options)
tunesmith.run.result.write_{part} = limited
"""
    failed = place.run(run, prelude=prelude)
    assert_clean(failed, code=1)
    assert "File too large" in failed.said
    assert "tunesmith resume" in failed.said
    assert place.resume(run).code == 0
    assert_same_run(run, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MB: room for two checkpoints, not for three."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a disk can't be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(place: Place, undisturbed: Path, small_disk: Path) -> None:
    run = small_disk / "run"
    failed = place.run(run)
    assert_clean(failed, code=1)
    assert "the disk is full; step-2 is intact" in failed.said
    assert "checkpoint.keep" in failed.said
    assert place.resume(run, ["checkpoint.keep=1"]).code == 0
    assert_same_run(run, undisturbed)


def test_a_disk_that_others_fill(place: Place, undisturbed: Path, small_disk: Path) -> None:
    """Not even a line of metrics can be written."""
    run, filler = small_disk / "run", small_disk / "filler"
    prelude = f"""
import os
from tunesmith.train.trainer import Trainer
learn = Trainer._learn
def filled(self, number, lr):
    if number == 2:
        filler = os.open({str(filler)!r}, os.O_WRONLY | os.O_CREAT)
        for size in (4096, 1):
            try:
                while True:
                    os.write(filler, b"x" * size)
            except OSError:
                pass
    return learn(self, number, lr)
Trainer._learn = filled
"""
    failed = place.run(run, prelude=prelude)
    assert_clean(failed, code=1)
    assert "No space left" in failed.said or "the disk is full" in failed.said
    filler.unlink()
    assert place.resume(run, ["checkpoint.keep=1"]).code == 0
    assert_same_run(run, undisturbed)
