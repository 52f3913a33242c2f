import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.sources.files import find, folder_files, is_pattern, pattern_files
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.errors import DataError

ROWS = [{"text": f"row {n} \u2028 ü", "n": n} for n in range(2500)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "x"}\n')


def names(found) -> list[str]:
    assert all(path.is_file() for _, path in found)
    return [name for name, _ in found]


def compressed(path: Path, codec: str, content: bytes) -> None:
    with pa.output_stream(str(path), compression=codec) as file:
        file.write(content)


def test_every_kind_of_file_keeps_its_rows_and_their_numbers(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    # Two members one after the other are one file.
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))
    compressed(tmp_path / "c.jsonl.zst", "zstd", lines)
    compressed(tmp_path / "d.json.zst", "zstd", json.dumps(ROWS, indent=1).encode())
    pq.write_table(table, tmp_path / "e.parquet", row_group_size=700)
    with pa.ipc.new_file(tmp_path / "f.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=900)
    with pa.ipc.new_stream(tmp_path / "g.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "h.json").write_text(json.dumps({"rows": ROWS}))
    for name, path in folder_files("x", tmp_path):
        rows = list(read_rows(Source(name, path=path)))
        assert [row.values for row in rows] == ROWS, name
        assert [str(row.origin) for row in rows[:2]] == [f"{name}:0", f"{name}:1"]


def test_csv_and_tsv_with_their_delimiters(tmp_path):
    (tmp_path / "a.tsv").write_text('a\tb\n1,2\t"x\ty"\n')
    compressed(tmp_path / "b.tsv.gz", "gzip", b"a\tb\n1,2\tz\n")
    rows = [
        row.values for name in ("a.tsv", "b.tsv.gz")
        for row in read_rows(Source(name, path=tmp_path / name))
    ]  # fmt: skip
    assert rows == [{"a": "1,2", "b": "x\ty"}, {"a": "1,2", "b": "z"}]


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_damaged_compressed_file_is_named(tmp_path, codec):
    path = tmp_path / f"a.jsonl.{'gz' if codec == 'gzip' else 'zst'}"
    compressed(path, codec, "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"no codec at all", whole[:40] + b"!" * 99):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="damaged or cut off") as caught:
            list(read_rows(Source("a", path=path)))
        assert caught.value.where == "a"


def test_faults_in_a_compressed_file_name_their_lines(tmp_path):
    compressed(tmp_path / "a.jsonl.gz", "gzip", b'{"text": "x"}\n{"text"\n')
    rows = list(read_rows(Source("a.jsonl.gz", path=tmp_path / "a.jsonl.gz")))
    assert "line 2" in rows[1].fault.message


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_tables_that_are_none(tmp_path, name):
    for content in (b"", b"ARROW1 and no more", b"PAR1PAR1"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not readable as") as caught:
            list(read_rows(Source(name, path=tmp_path / name)))
        assert caught.value.where == name


def test_patterns_are_sorted_and_keep_to_what_can_be_read(here):
    touch(here, "data/b.jsonl", "data/a.jsonl", "data/notes.txt", "data/sub/c.csv", "data/.h.jsonl")
    assert names(pattern_files("data/*.jsonl")) == ["data/a.jsonl", "data/b.jsonl"]
    assert names(pattern_files("data/*")) == ["data/a.jsonl", "data/b.jsonl"]
    assert names(pattern_files("data/**/*.csv")) == ["data/sub/c.csv"]
    assert names(pattern_files("data/[b-z].jsonl")) == ["data/b.jsonl"]
    assert names(pattern_files(f"{here}/data/?.jsonl"))[0] == f"{here}/data/a.jsonl"
    for pattern, message in (("data/*.parquet", "no file matches"), ("data/*.txt", "can't be")):
        with pytest.raises(DataError, match=message):
            pattern_files(pattern)


def test_patterns_are_looked_for_here_then_beside_the_recipe(here):
    touch(here / "beside", "data/a.jsonl")
    folders = [here / "nowhere", here / "beside"]
    assert pattern_files("data/*.jsonl", folders) == [
        ("data/a.jsonl", here / "beside" / "data" / "a.jsonl")
    ]
    touch(here, "data/z.jsonl")
    assert names(pattern_files("data/*.jsonl", folders)) == ["data/z.jsonl"]
    assert find("data/a.jsonl", folders) == here / "beside" / "data" / "a.jsonl"


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(here):
    touch(here, "a[1].jsonl")
    assert not is_pattern("a[1].jsonl")
    assert is_pattern("a[12].jsonl")


def test_a_folder_is_its_readable_files(here):
    touch(
        here, "d/b.jsonl", "d/sub/a.jsonl", "d/README.md", "d/.cache/x.jsonl", "d/dataset_info.json"
    )
    assert names(folder_files("d", here / "d")) == ["d/b.jsonl", "d/sub/a.jsonl"]
    (here / "empty").mkdir()
    with pytest.raises(DataError, match="no file in this folder"):
        folder_files("empty", here / "empty")


def test_a_folder_with_several_splits_needs_a_choice(here):
    touch(here, "d/train.jsonl", "d/test.jsonl")
    with pytest.raises(DataError, match="several splits: test, train") as caught:
        folder_files("d", here / "d")
    assert "split:" in caught.value.hint
    assert names(folder_files("d", here / "d", split="test")) == ["d/test.jsonl"]


def test_what_datasets_saves_is_read_without_its_caches(here):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk("one", num_shards=2)
    (here / "one" / "cache-0123.arrow").write_bytes(b"left by a map")
    found = folder_files("one", here / "one")
    assert names(found) == [f"one/data-0000{n}-of-00002.arrow" for n in (0, 1)]
    rows = [row.values for name, path in found for row in read_rows(Source(name, path=path))]
    assert rows == ROWS
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk("two")
    assert names(folder_files("two", here / "two", split="train")) == [
        "two/train/data-00000-of-00001.arrow"
    ]
