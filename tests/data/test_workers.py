"""Rendering in other processes: the same in the same order, and clear words when one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest
from test_cache import alike

import tunesmith.data.preprocess.workers as module
from tiny import CHATML, chat_rows, tiny_tokenizer, write_jsonl
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.preprocess.render_batch import Options
from tunesmith.data.preprocess.workers import pack_batches
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.errors import RunError

ROWS = 3000


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    rows = chat_rows(ROWS)
    rows[7], rows[2500] = {"messages": []}, {"text": "of another format"}
    return Source("rows", path=write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows))


@pytest.fixture(params=["copies", "interpreters"])
def kind(request, monkeypatch):
    """What the other processes are; copies where a copy is safe, as it is here on Linux."""
    if request.param == "interpreters":
        monkeypatch.setattr(module, "may_fork", lambda: False)
    elif not module.may_fork():
        pytest.skip("no copies here")
    return request.param


@pytest.fixture
def at_once(kind, monkeypatch):
    """Batches wait until the other processes are ready, so that these do the work."""
    monkeypatch.setattr(module._Pool, "ready", property(wait_until_ready))


def wait_until_ready(pool):
    import time

    while (states := [worker.state() for worker in pool._workers]) and None in states:
        time.sleep(0.05)
    pool.failed = next((one for one in states if one != "ready"), pool.failed)
    return pool.failed is None


def run(source, **options):
    template = wrap_tokenizer(tiny_tokenizer())
    return prepare([source], template, max_length=60, too_long="drop", bad_rows="drop", **options)


@pytest.mark.usefixtures("at_once")
def test_documents_faults_and_ledger_are_the_same(source):
    alone, together = run(source), run(source, processes=2)
    assert together.notes == ["data: prepared in 2 processes"]
    assert alike(alone, together)
    assert [origin.row for origin, _ in together.faults] == [7, 2500]


@pytest.mark.usefixtures("at_once")
def test_a_process_that_is_killed_is_told_of(source):
    pools = []
    start = module._Pool.__init__

    def noted(pool, *arguments):
        start(pool, *arguments)
        pools.append(pool)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._Pool, "__init__", noted)
        give = module._Pool.give

        def give_and_kill(pool, tasks):
            number = give(pool, tasks)
            if number == 3:
                os.kill(pool._workers[1]._process.pid, signal.SIGKILL)
            return number

        patch.setattr(module._Pool, "give", give_and_kill)
        with pytest.raises(RunError, match="ended by signal 9") as caught:
            run(source, processes=2)
    assert "num_proc" in caught.value.hint
    assert all(worker._process.poll() is not None for worker in pools[0]._workers)


def test_what_cant_be_pickled_is_prepared_here_where_there_are_no_copies(source, monkeypatch):
    monkeypatch.setattr(module, "may_fork", lambda: False)
    tokenizer = tiny_tokenizer()
    tokenizer.odd = lambda: None  # can't be pickled
    prepared = prepare(
        [source], wrap_tokenizer(tokenizer), max_length=None, bad_rows="drop", processes=2
    )
    assert len(prepared.documents) == ROWS - 2
    assert any("one process" in note for note in prepared.notes)


def test_small_data_starts_no_process(source, monkeypatch):
    monkeypatch.setattr(module, "_Pool", None)  # calling it would fail
    monkeypatch.setattr(module, "START_COPIES_AFTER", 60.0)  # what is small is for the machine
    monkeypatch.setattr(module, "START_AFTER", 60.0)
    assert run(source, processes=None).notes == []


def test_a_process_with_other_threads_is_not_copied():
    import threading

    from tunesmith.data.preprocess import fork_pool

    leave = threading.Event()
    other = threading.Thread(target=leave.wait)
    other.start()
    try:
        assert not fork_pool.may_fork()
    finally:
        leave.set()
        other.join()


@pytest.mark.skipif(not module.may_fork(), reason="no copies here")
def test_a_copy_that_can_not_be_made_leaves_the_work_here(source, monkeypatch):
    def refused():
        raise BlockingIOError("no process left")

    monkeypatch.setattr(module, "may_fork", lambda: True)
    monkeypatch.setattr(os, "fork", refused)
    prepared = run(source, processes=2)
    assert alike(run(source), prepared)
    assert any("no process left" in note for note in prepared.notes)


def test_a_template_travels(tmp_path):
    import pickle

    template = wrap_tokenizer(tiny_tokenizer(CHATML), kwargs={"a": 1})
    messages = [{"role": "user", "content": "Where?"}]
    text = template.render(messages)
    copy = pickle.loads(pickle.dumps(template))
    assert isinstance(copy, Template)
    assert copy.render(messages) == text
    assert copy.stop_ids == template.stop_ids


def test_no_processes_stay_behind_when_the_reader_leaves(source, at_once, monkeypatch):
    pools = []
    stop = module._Pool.stop
    monkeypatch.setattr(module._Pool, "stop", lambda pool: (pools.append(pool), stop(pool)))
    from tunesmith.data.preprocess.render_batch import Task
    from tunesmith.data.sources.sources import read_rows

    tasks = [Task(row.origin, row.values, "messages", False) for row in read_rows(source)]
    batches = ((None, tasks[at : at + 16]) for at in range(0, 640, 16))
    template = wrap_tokenizer(tiny_tokenizer())
    stream = pack_batches(batches, template, Options(), processes=2)
    next(stream)
    stream.close()
    assert pools
    assert all(worker._process.poll() is not None for worker in pools[0]._workers)


def test_a_script_without_a_main_guard(source, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
            import sys
            from pathlib import Path

            sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__)) + "/.."!r})
            print("started", flush=True)
            from tiny import tiny_tokenizer
            from tunesmith.data.preprocess import workers
            from tunesmith.data.preprocess.prepare import prepare
            from tunesmith.data.sources.sources import Source
            from tunesmith.data.templates.load import wrap_tokenizer

            ready = workers._Pool.ready.fget
            def wait(pool):
                while not ready(pool) and pool.failed is None:
                    pass
                return pool.failed is None
            workers._Pool.ready = property(wait)
            source = Source("rows", path=Path({str(source.path)!r}))
            template = wrap_tokenizer(tiny_tokenizer())
            found = prepare([source], template, max_length=None, bad_rows="drop", processes=2)
            print(len(found.documents), found.notes[0])
        """)
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["started", f"{ROWS - 2} data: prepared in 2 processes"], (
        done.stderr
    )
