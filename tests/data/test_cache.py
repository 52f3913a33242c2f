"""The cache of documents: the same from it as without it, never wrong, never in the way."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from test_document_store import same

import tunesmith
from tiny import CHATML, chat_rows, tiny_tokenizer, write_jsonl
from tunesmith.data.preprocess import cache as module
from tunesmith.data.preprocess.cache import MANIFEST
from tunesmith.data.preprocess.holdout import Side, holdout_split
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.sources.hub import default_cache_folder
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import DataError

DATED = "{% if false %}{{ strftime_now('%d') }}{% endif %}" + CHATML
OPTIONS = {"max_length": 200, "too_long": "truncate", "bad_rows": "drop"}


@pytest.fixture
def source(tmp_path):
    rows = [*chat_rows(8), {"messages": []}, {"messages": [{"role": "user", "content": "?"}]}]
    return Source("rows", path=write_jsonl(tmp_path / "rows.jsonl", rows))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


def run(source, folder=None, template=None, **options):
    chosen = template or wrap_tokenizer(tiny_tokenizer())
    return prepare([source], chosen, cache=folder, **{**OPTIONS, **options})


def entries(folder):
    return [path for path in (folder / "documents").iterdir() if not path.name.startswith(".")]


def hit(prepared):
    return any("from the cache" in note for note in prepared.notes)


def alike(one, other):
    documents = zip(one.documents, other.documents, strict=True)
    names = ("formats", "sample_text", "faults", "content_hashes")
    return (
        all(same(a, b) for a, b in documents)
        and one.ledger.to_dict() == other.ledger.to_dict()
        and all(getattr(one, name) == getattr(other, name) for name in names)
    )


def test_the_second_time_gives_the_same(source, folder):
    plain, first, second = run(source), run(source, folder), run(source, folder)
    assert (hit(plain), hit(first), hit(second)) == (False, False, True)
    assert alike(plain, first)
    assert alike(first, second)
    assert second.faults
    assert len(entries(folder)) == 1


def test_bad_rows_are_refused_from_the_cache_too(source, folder, tmp_path):
    run(source, folder)
    assert hit(run(source, folder))
    listed = tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match="1 of 10 rows"):
        run(source, folder, bad_rows="error", faults_file=listed)
    assert json.loads(listed.read_text())["row"] == 8


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 100},
        {"too_long": "drop"},
        {"train_on": "last"},
        {"template": wrap_tokenizer(tiny_tokenizer(CHATML.replace("\n", "\n\n", 1)))},
        {"template": wrap_tokenizer(tiny_tokenizer(extra_special=("<|other|>",)))},
        {"template": wrap_tokenizer(tiny_tokenizer(), kwargs={"thinking": True})},
        {"template": wrap_tokenizer(tiny_tokenizer(bos_token="<|endoftext|>"))},
    ],
)
def test_what_changes_documents_is_another_entry(source, folder, change):
    run(source, folder)
    assert not hit(run(source, folder, **change))
    assert hit(run(source, folder, **change))
    assert hit(run(source, folder))


def test_data_and_how_it_is_read_are_part_of_the_entry(source, folder, tmp_path):
    run(source, folder)
    assert not hit(run(replace(source, limit=3), folder))
    assert not hit(run(replace(source, name="other"), folder))
    assert not hit(run(replace(source, format="messages"), folder))
    write_jsonl(source.path, chat_rows(5))
    changed = run(source, folder)
    assert not hit(changed)
    assert len(changed.documents) == 5


def test_other_code_is_another_entry(source, folder, monkeypatch):
    run(source, folder)
    monkeypatch.setattr(module, "_code_key", lambda: ["other code"])
    assert not hit(run(source, folder))


def test_the_code_of_every_module_that_makes_documents_counts():
    here = Path(tunesmith.__file__).parent
    data = {
        Path(str(one.__file__))
        for name, one in sys.modules.items()
        if name.startswith("tunesmith.data.") and one.__file__ is not None
    }
    assert here / "data" / "rendering" / "render.py" in data
    assert data | {here / "types.py"} <= set(module._code_files())


def test_a_template_with_a_date_is_kept_for_a_day(source, folder, monkeypatch):
    dated = wrap_tokenizer(tiny_tokenizer(DATED))
    run(source, folder, dated)
    assert hit(run(source, folder, dated))

    class Tomorrow:
        @staticmethod
        def today():
            return Tomorrow

        @staticmethod
        def isoformat():
            return "2999-01-01"

    monkeypatch.setattr(module, "date", Tomorrow)
    assert not hit(run(source, folder, dated))


@pytest.mark.parametrize("name", ["ids.bin", "runs.bin", "segments.bin", "documents.bin", MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_told_and_made_anew(source, folder, name, damage):
    plain = run(source)
    run(source, folder)
    (entry,) = entries(folder)
    content = bytearray((entry / name).read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    (entry / name).write_bytes(content[: len(content) - (damage == "cut")])
    if damage == "remove":
        (entry / name).unlink()
    again = run(source, folder)
    assert not hit(again)
    assert alike(plain, again)
    assert any("damaged" in note for note in again.notes)
    assert hit(run(source, folder))


def test_sides_of_a_hold_out_are_cached_apart(source, folder):
    choice = holdout_split(chat_rows(8), count=2)
    sides = [Side(choice, True), Side(choice, False)]
    sizes = [len(run(source, folder, keep=side).documents) for side in sides]
    assert sizes == [2, 6]
    again = [run(source, folder, keep=side) for side in sides]
    assert all(hit(prepared) for prepared in again)
    assert [len(prepared.documents) for prepared in again] == sizes
    assert not hit(run(source, folder, keep=lambda values: True))
    assert not hit(run(source, folder, keep=lambda values: True))


def test_rows_in_memory_are_not_cached(folder):
    for _ in range(2):
        assert not hit(run(Source("rows", rows=chat_rows(3)), folder))
    assert not folder.exists()


def test_a_folder_that_cant_be_written_is_no_error(source, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    prepared = run(source, blocked)
    assert alike(prepared, run(source))
    assert any("can't be written" in note for note in prepared.notes)


def test_a_full_disk_is_no_error(source, folder, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    prepared = run(source, folder)
    assert alike(prepared, run(source))
    assert any("No space left" in note for note in prepared.notes)
    assert list((folder / "documents").iterdir()) == []


def test_nothing_is_kept_of_what_nobody_can_train_on(tmp_path, folder):
    path = write_jsonl(tmp_path / "bad.jsonl", [{"messages": []}])
    with pytest.raises(DataError):
        run(Source("bad", path=path), folder)
    assert entries(folder) == []


def test_a_file_that_changes_while_it_is_read_is_not_kept(source, folder, monkeypatch):
    import tunesmith.data.preprocess.prepare as preparing

    stamps = iter([[(1, 1)], [(1, 2)]])
    monkeypatch.setattr(preparing, "_stamps", lambda sources: next(stamps))
    run(source, folder)
    assert entries(folder) == []


def test_two_at_a_time_leave_one_whole_entry(source, folder):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(run(source, folder))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(alike(results[0], one) for one in results[1:])
    assert len(list((folder / "documents").iterdir())) == 1
    assert hit(run(source, folder))


def test_old_entries_and_leftovers_go(source, folder):
    import os

    run(source, folder)
    (entry,) = entries(folder)
    left = folder / "documents" / ".abc.tmp"
    left.mkdir()
    for path in (entry / MANIFEST, left):
        os.utime(path, (0, 0))
    run(source, folder, train_on="last")
    assert [path.name for path in (folder / "documents").iterdir()] != [entry.name]
    assert not entry.exists()
    assert not left.exists()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.delenv("TUNESMITH_CACHE", raising=False)
    assert default_cache_folder() == Path("/x/tunesmith")
    monkeypatch.setenv("TUNESMITH_CACHE", "/y")
    assert default_cache_folder() == Path("/y")
