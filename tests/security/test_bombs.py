"""Small files that expand to gigabytes: read as far as they are rows, then an error of ours, in a
process that may not take more than a bounded amount of memory.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tiny import tiny_folder
from tunesmith.cli.app import run
from tunesmith.data.preprocess import prepare
from tunesmith.data.preprocess.render_batch import in_batches
from tunesmith.data.sources.readers import registry, row_sizes
from tunesmith.data.sources.readers import rows as raw
from tunesmith.data.sources.readers.rows import LongRow
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.errors import DataError

MIB = 1 << 20
READ = """
import resource, sys
from pathlib import Path
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.errors import DataError
import pyarrow.parquet, pyarrow.compute
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
count = 0
try:
    for row in read_rows(Source("bomb", path=Path(sys.argv[1]))):
        count += 1
        if count == 3000:
            break
except DataError as error:
    print("error", count, error.where, "|", error.hint, "|", str(error).splitlines()[0])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
"""


def parquet(table: pa.Table, path: Path, **options) -> None:
    pq.write_table(table, path, compression="zstd", **options)


def repeated_text(path: Path) -> None:
    """Every row of a dictionary is the same 64 MiB, and 3,000 of them 180 GiB."""
    column = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(3000, np.int32)), pa.array(["a" * (64 * MIB)])
    )
    parquet(
        pa.table({"text": column}), path, row_group_size=3000, dictionary_pagesize_limit=1 << 30,
        store_schema=False,
    )  # fmt: skip


def repeated_as_such(path: Path) -> None:
    """The same, and the file asks for it to be read as a dictionary."""
    column = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(3000, np.int32)), pa.array(["a" * (128 * MIB)])
    )
    parquet(pa.table({"text": column}), path, dictionary_pagesize_limit=1 << 30)


def repeated_in_lists(path: Path) -> None:
    """One row of a list of 16 times 32 MiB."""
    text = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(16, np.int32)), pa.array(["a" * (32 * MIB)])
    )
    parquet(
        pa.table({"text": pa.ListArray.from_arrays([0, 16], text)}), path,
        dictionary_pagesize_limit=1 << 30,
    )  # fmt: skip


def list_of_nulls(path: Path) -> None:
    """One row of two hundred million nulls."""
    nulls = pa.nulls(200_000_000, pa.null())
    with pa.OSFile(str(path), "wb") as file:
        table = pa.table({"text": pa.ListArray.from_arrays([0, len(nulls)], nulls)})
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)


def arrow(column: pa.Array, path: Path) -> None:
    table = pa.table({"text": column})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(path), table.schema, options=options) as writer:
        writer.write_table(table)


def repeated_in_arrow(path: Path) -> None:
    one = pa.array(["a" * (300 * MIB)])
    arrow(pa.DictionaryArray.from_arrays(pa.array(np.zeros(1024, np.int32)), one), path)


def runs(path: Path) -> None:
    one = pa.array(["a" * (300 * MIB)])
    arrow(pa.RunEndEncodedArray.from_arrays(pa.array([5000], pa.int32()), one), path)


def views_of_the_same(path: Path) -> None:
    """A thousand lists that all show the same four million empty lists."""
    inner = pa.ListArray.from_arrays(
        pa.array(np.zeros(4 * MIB + 1, np.int32)), pa.array(np.zeros(0, np.int32))
    )
    count = 1000
    arrow(
        pa.ListViewArray.from_arrays(
            pa.array(np.zeros(count, np.int32)), pa.array(np.full(count, 4 * MIB, np.int32)), inner
        ),
        path,
    )


def zeros(path: Path) -> None:
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(600):
            file.write(bytes(MIB))


BOMBS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "lists in parquet": ("a.parquet", repeated_in_lists, "longer than 256 MiB"),
    "nulls": ("a.arrow", list_of_nulls, "longer than 256 MiB"),
    "dictionary": ("b.arrow", repeated_in_arrow, "longer than 256 MiB"),
    "runs": ("c.arrow", runs, "longer than 256 MiB"),
    "views": ("d.arrow", views_of_the_same, "longer than 256 MiB"),
    "dictionary as such": ("c.parquet", repeated_as_such, "more than 5,000 times its size"),
    "dictionary in parquet": ("b.parquet", repeated_text, "takes more memory than there is"),
    "zeros": ("a.jsonl.gz", zeros, "line 1 is longer than 256 MiB"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="measures as Linux does")
@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_ends_in_an_error_before_memory_does(name: str, tmp_path: Path) -> None:
    file, write, wanted = BOMBS[name]
    write(tmp_path / file)
    assert (tmp_path / file).stat().st_size < 4 * MIB
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / file)],
        capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    assert wanted in said
    assert said.startswith("error ")
    assert " bomb" in said
    assert int(said.split("peak")[1]) < 3500, said


def test_text_that_expands_out_of_proportion_is_not_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(raw, "USUAL", 4 * MIB)
    data = tmp_path / "rows.jsonl.gz"
    with gzip.open(data, "wb") as file:
        file.write(b'{"text": "a"}\n' * MIB)
    assert run(["preview", "--model", "none", "--data", str(data)]) == 2
    capsys.readouterr()
    with pytest.raises(DataError, match="more than 500 times its size") as caught:
        list(read_rows(Source("rows", path=data)))
    assert caught.value.hint
    monkeypatch.setitem(registry.MOST_TIMES, "gzip", 5000)
    assert sum(1 for _ in read_rows(Source("rows", path=data))) == MIB


def test_a_quote_that_is_never_closed_is_not_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "LONGEST", 1 << 21)
    data = tmp_path / "rows.csv"
    data.write_bytes(b'text\ngood\n"' + (b"a" * 1023 + b"\n") * 4096)
    rows = read_rows(Source("rows", path=data))
    assert next(rows).values == {"text": "good"}
    with pytest.raises(DataError, match="the row that begins on line 3 is longer than 2 MiB"):
        next(rows)


@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_value_of_too_many_values_is_not_parsed(
    ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw, "_MOST_VALUES", 1 << 20)
    data = tmp_path / f"rows.{ending}"
    data.write_bytes(b'{"text": [' + b"[]," * (2 * MIB) + b"0]}\n")
    if ending == "json":
        with pytest.raises(DataError, match="holds too many others"):
            list(read_rows(Source("rows", path=data)))
        return
    (row,) = read_rows(Source("rows", path=data))
    assert row.values is None
    assert row.fault is not None
    assert "too many values" in row.fault.message


def test_rows_that_are_nearly_all_bad_are_not_read_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "MOST_FAULTS", 1000)
    tiny_folder(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "good"}\n' * 900 + "0\n" * 5000)
    words = ["train", "--model", str(tmp_path / "model"), "--data", str(data)]
    assert run([*words, "--out", str(tmp_path / "run"), "data.bad_rows=drop"]) == 2
    said = capsys.readouterr().err
    assert "so the rest was not read" in said
    assert "rows.jsonl:" in said


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_long_rows_are_known_as_such(kind: str, tmp_path: Path) -> None:
    """Few of them are held at a time."""
    texts = ["short", "a" * raw.LONG, "b"]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif kind == "arrow":
        arrow(pa.array(texts), path)
    else:
        lines = [json.dumps({"text": text}) for text in texts]
        whole = {"jsonl": "\n".join(lines), "json": f"[{','.join(lines)}]"}
        path.write_text(whole.get(kind) or "\n".join(["text", *texts]))
    rows = list(read_rows(Source("rows", path=path, columns={"text": "text"})))
    assert [type(row.values) is LongRow for row in rows] == [False, True, False]
    assert [len(batch) for batch in in_batches(rows * 3)] == [1, 1, 3, 3, 1]


def test_sizes_are_counted_as_what_is_made_of_columns() -> None:
    """Within a factor of what Python says, whatever the columns are."""
    words = ["", "a" * 1000, None, "bc"]
    some = pa.array(words)
    columns = {
        "text": some,
        "large": some.cast(pa.large_string()),
        "view": some.cast(pa.string_view()),
        "dictionary": some.dictionary_encode(),
        "runs": pa.RunEndEncodedArray.from_arrays([1, 2, 3, 4], some),
        "list": pa.array([["a" * 10] * 5, None, [], ["b"]]),
        "struct": pa.array([{"a": "x" * 99, "b": [1, 2]}, None, {"a": None, "b": []}, {}]),
        "map": pa.array([[("k", "v" * 50)], [], None, []], pa.map_(pa.string(), pa.string())),
        "fixed": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2)),
        "list view": pa.array([["a"] * 9, None, [], ["b"]], pa.list_view(pa.string())),
        "nulls": pa.nulls(4),
        "bytes": pa.array([b"12345678"] * 4, pa.binary(8)),
        "number": pa.array([1, 2, None, 4]),
    }
    for name, column in columns.items():
        whole = pa.record_batch({name: column})
        for batch in (whole, whole.slice(1, 2), whole.slice(3), whole.slice(4)):
            ((part, counted),) = row_sizes.small_batches(batch, "a", 0)
            made = [deep(values[name]) for values in part.to_pylist()]
            assert len(counted) == batch.num_rows
            for said, true in zip(counted, made, strict=True):
                assert true / 2.5 <= said <= 4 * true + 200, (name, said, true)


def deep(value: object) -> int:
    inside: list[object] = []
    if isinstance(value, dict):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple):
        inside = list(value)
    return sys.getsizeof(value) + sum(map(deep, inside))
