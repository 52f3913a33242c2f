import io
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tunesmith.data.sources.readers.json as reader
from tunesmith.data.sources.readers.columnar import parquet_rows
from tunesmith.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
rows = st.lists(st.dictionaries(st.text(max_size=4), values, max_size=4), min_size=1, max_size=6)


def read(content: bytes) -> list:
    return [row for row, _ in reader.json_rows(io.BytesIO(content), "a.json")]


@pytest.fixture
def blocks():
    """A function that sets how much is read at a time."""
    before = reader._BLOCK

    def size(count: int) -> None:
        reader._BLOCK = count

    yield size
    reader._BLOCK = before


@given(rows=rows, indent=st.sampled_from([None, 1]), ascii=st.booleans(), block=st.integers(1, 9))
@settings(deadline=None)
def test_lists_objects_and_lines_are_the_same_rows_however_they_are_cut(rows, indent, ascii, block):
    before, reader._BLOCK = reader._BLOCK, block
    try:
        written = [json.dumps(row, indent=indent, ensure_ascii=ascii) for row in rows]
        for content in (
            f"[{','.join(written)}]\n",
            f'{{"n": 1, "data": [{",".join(written)}]}}',
            "\n".join(written) if len(written) > 1 else f"[{written[0]}]",
            "\ufeff" + f" [ {' , '.join(written)} ] ",
        ):
            assert read(content.encode()) == rows
    finally:
        reader._BLOCK = before


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1},\n {"a": }]', "Expecting value at line 2, column 8"),
        (b'[{"a": 1}\n {"a": 2}]', "Expecting ',' delimiter at line 2, column 2"),
        (b'[{"a": 1},\n', "Expecting value at line 2, column 1"),
        (b'[{"a": 1}\n', "the list has no end at line 2, column 1"),
        (b'{"a": 1}\n{"a": "x', "Unterminated string starting at at line 2, column 7"),
        (b'[{"a": 1}]\n\n7', "Extra data at line 3, column 1"),
    ],
)
def test_what_is_wrong_is_named_by_line_and_column(blocks, block, content, message):
    blocks(block)
    with pytest.raises(DataError) as caught:
        read(content)
    assert caught.value.message == f"not JSON: {message}"


def test_items_that_are_no_objects_or_no_text_are_faults():
    found = list(reader.json_rows(io.BytesIO(b'[7, {"a": "\\ud800"}, {"a": 1}]'), "a.json"))
    assert [fault.kind if fault else None for _, fault in found] == [
        "invalid-json", "invalid-encoding", None,
    ]  # fmt: skip
    assert "item 1" in found[1][1].message


@pytest.mark.parametrize("start", [b"[", b""])
def test_a_list_is_not_read_ahead(blocks, start):
    blocks(1000)
    item = json.dumps({"text": "x" * 90}).encode()
    file = io.BytesIO(start + (b"," if start else b"\n").join([item] * 1000) + b"]")
    stream = reader.json_rows(file, "a.json")
    for _ in range(20):
        next(stream)
    assert file.tell() < 5000


def test_a_parquet_file_is_not_held_whole(tmp_path):
    table = pa.table({"text": ["y" * 1000] * 2000})
    with pq.ParquetWriter(
        tmp_path / "a.parquet", table.schema, use_dictionary=False, compression="none"
    ) as writer:
        for _ in range(20):
            writer.write_table(table)
    # What is read through a Python file is held as Python's bytes.
    tracemalloc.start()
    try:
        with (tmp_path / "a.parquet").open("rb") as file:
            count = sum(1 for _ in parquet_rows(file, "a.parquet"))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 40_000
    assert most < 12_000_000  # of 40 MB
