"""A large file is read through again exactly when it may have changed."""

from __future__ import annotations

import os
import time
import zlib
from pathlib import Path

import pytest

from tiny import chat_rows, tiny_tokenizer, write_jsonl
from tunesmith.data.preprocess import cache as cache_module
from tunesmith.data.preprocess import digest_cache as module
from tunesmith.data.preprocess.digest_cache import DigestCache
from tunesmith.data.preprocess.prepare import Prepared, prepare
from tunesmith.data.sources.sources import Source, content_hash
from tunesmith.data.templates.load import wrap_tokenizer


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file that counts as large, and was not changed just now."""
    monkeypatch.setattr(module, "LEAST", 4)
    monkeypatch.setattr(module, "SETTLED", 0.05)
    path = tmp_path / "rows.bin"
    path.write_bytes(b"some rows")
    time.sleep(0.1)
    return path


class Counted:
    """The checksum of a file, and how often it was made."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def __call__(self) -> str:
        self.count += 1
        return str(zlib.crc32(self.path.read_bytes()))


def test_a_file_is_read_once(large: Path, tmp_path: Path) -> None:
    made = Counted(large)
    first = DigestCache(tmp_path / "known").digest(large, "crc32", made)
    again = DigestCache(tmp_path / "known").digest(large, "crc32", made)
    assert first == again == str(zlib.crc32(b"some rows"))
    assert made.count == 1
    DigestCache(tmp_path / "known").digest(large, "sha256", made)
    assert made.count == 2


def test_a_small_file_is_always_read(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST", 10)
    made, known = Counted(large), DigestCache(tmp_path / "known")
    known.digest(large, "crc32", made)
    known.digest(large, "crc32", made)
    assert made.count == 2


@pytest.mark.parametrize("change", ["bytes", "bytes, with the old time", "another file", "length"])
def test_a_change_is_seen(large: Path, tmp_path: Path, change: str) -> None:
    known, before = DigestCache(tmp_path / "known"), large.stat()
    old = known.digest(large, "crc32", Counted(large))
    if change == "another file":
        other = tmp_path / "other"
        other.write_bytes(b"same rows")
        other.replace(large)
    else:
        large.write_bytes(b"same rows" + b"!" * (change == "length"))
    if change != "bytes":
        os.utime(large, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (
        known.digest(large, "crc32", Counted(large)) == str(zlib.crc32(large.read_bytes())) != old
    )


def test_a_file_that_changed_just_now_is_not_remembered(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SETTLED", 60.0)
    made, known = Counted(large), DigestCache(tmp_path / "known")
    known.digest(large, "crc32", made)
    known.digest(large, "crc32", made)
    assert made.count == 2
    known.digest(large, "crc32", made, written_here=True)
    known.digest(large, "crc32", made)
    assert made.count == 3


def test_what_changes_while_it_is_read_is_not_remembered(large: Path, tmp_path: Path) -> None:
    known = DigestCache(tmp_path / "known")

    def reading() -> str:
        found = str(zlib.crc32(large.read_bytes()))
        large.write_bytes(b"other rows")
        return found

    known.digest(large, "crc32", reading)
    assert known.digest(large, "crc32", Counted(large)) == str(zlib.crc32(b"other rows"))


def test_a_folder_that_cant_be_written_or_was_left_empty_costs_a_reading_only(
    large: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    made = Counted(large)
    assert DigestCache(tmp_path / "file").digest(large, "crc32", made) == made()
    known = DigestCache(tmp_path / "known")
    known.digest(large, "crc32", made)
    (place,) = (tmp_path / "known").iterdir()
    place.write_text("")
    assert known.digest(large, "crc32", made) == made()


def test_what_nobody_asks_for_is_forgotten(large: Path, tmp_path: Path) -> None:
    known = DigestCache(tmp_path / "known")
    known.digest(large, "crc32", Counted(large))
    known.prune(time.time() - 3600)
    assert len(list(known.folder.iterdir())) == 1
    known.prune(time.time() + 1)
    assert not list(known.folder.iterdir())


def test_a_second_start_reads_neither_data_nor_documents_through(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source("rows", path=write_jsonl(tmp_path / "rows.jsonl", chat_rows(8)))
    time.sleep(0.1)
    template = wrap_tokenizer(tiny_tokenizer())

    def start() -> Prepared:
        return prepare([source], template, max_length=None, cache=tmp_path / "cache")

    first = start()

    def never(*_: object) -> str:
        raise AssertionError("read through")

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "content_hash", never)
        patch.setattr(cache_module, "_checksum", never)
        second = start()
    assert any("from the cache" in note for note in second.notes)
    assert second.content_hashes == first.content_hashes == {"rows": content_hash(source)}
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(9))
    third = start()
    assert len(third.documents) == 9
    assert third.content_hashes == {"rows": content_hash(source)}
