import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunesmith.data.sources.sources import Source, content_hash, read_rows, resolve_path
from tunesmith.errors import DataError

ROWS = [{"prompt": "a\nb", "completion": 'c, "d"'}, {"prompt": "e", "completion": "ü\u2028f"}]


def write(path: Path, content: str | bytes) -> Source:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Source(path.name, path=path)


def read(source: Source) -> list[dict | None]:
    return [row.values for row in read_rows(source)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    cells = 'prompt,completion\r\n"a\nb","c, ""d"""\r\ne,ü\u2028f\r\n'
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    sources = [
        write(tmp_path / "rows.jsonl", lines),
        write(tmp_path / "marked.ndjson", "\ufeff" + lines + "\r\n"),
        write(tmp_path / "rows.json", json.dumps(ROWS)),
        write(tmp_path / "lines.json", lines),
        write(tmp_path / "wrapped.json", json.dumps({"version": 1, "data": ROWS})),
        write(tmp_path / "rows.csv", cells),
        write(tmp_path / "marked.csv", "\ufeff" + cells),
        Source("rows.parquet", path=tmp_path / "rows.parquet"),
        Source("memory", rows=ROWS),
        Source("generator", rows=(row for row in ROWS)),
    ]
    for source in sources:
        assert read(source) == ROWS, source.name


def test_rows_are_numbered_from_0_and_blank_lines_do_not_count(tmp_path):
    source = write(tmp_path / "a.jsonl", '\n{"text": "x"}\n  \n{"text": "y"}\n')
    assert [str(row.origin) for row in read_rows(source)] == ["a.jsonl:0", "a.jsonl:1"]


def test_a_broken_line_is_a_fault_that_names_its_line_from_1(tmp_path):
    lines = ['{"text": "x"}'] * 20
    lines[16] = '{"text": "x"'
    rows = list(read_rows(write(tmp_path / "a.jsonl", "\n".join(lines))))
    assert len(rows) == 20
    bad = [row for row in rows if row.fault]
    assert [row.origin.row for row in bad] == [16]
    assert bad[0].fault.kind == "invalid-json"
    assert "line 17" in bad[0].fault.message


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"[1, 2]", "invalid-json"),
        (b'"text"', "invalid-json"),
        (b"null", "invalid-json"),
        (b'{"text": "\xff"}', "invalid-encoding"),
        (b'{"text": "\\ud800"}', "invalid-encoding"),
        (b"[" * 100_000, "invalid-json"),
    ],
)
def test_lines_that_are_no_objects_are_faults(tmp_path, line, kind):
    rows = list(read_rows(write(tmp_path / "a.jsonl", line + b'\n{"text": "y"}\n')))
    assert [row.fault.kind if row.fault else None for row in rows] == [kind, None]


def test_a_whole_pair_of_surrogates_is_text(tmp_path):
    assert read(write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}')) == [{"text": "😀"}]


def test_bad_csv_rows_are_faults(tmp_path):
    source = write(tmp_path / "a.csv", b"text,n\nx,1\ny\nz,1,2\n\xff,3\nw,4\n")
    kinds = [row.fault.kind if row.fault else None for row in read_rows(source)]
    assert kinds == [None, "invalid-csv", "invalid-csv", "invalid-encoding", None]


def test_an_open_quote_is_a_fault_and_ends(tmp_path):
    rows = list(read_rows(write(tmp_path / "a.csv", 'text,n\nx,1\n"y,2\nz,3\n')))
    assert [row.fault.kind if row.fault else None for row in rows] == [None, "invalid-csv"]


def test_a_datasets_object_is_an_iterable_of_rows():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    assert read(Source("m", rows=data)) == ROWS
    assert read(Source("m", rows=data.to_iterable_dataset())) == ROWS
    other = datasets.Dataset.from_list(ROWS[:1])
    chosen = Source("m", rows=datasets.DatasetDict({"test": other, "train": data}))
    assert (chosen.name, read(chosen)) == ("m/train", ROWS)
    assert Source("m", rows=datasets.DatasetDict({"test": other})).name == "m/test"
    with pytest.raises(DataError, match="`test`, `dev`"):
        Source("m", rows=datasets.DatasetDict({"test": other, "dev": data}))


def test_long_csv_fields_are_read(tmp_path):
    text = "x" * 300_000
    assert read(write(tmp_path / "a.csv", f"text\n{text}\n")) == [{"text": text}]


def test_items_that_are_no_mappings_are_faults():
    rows = list(read_rows(Source("memory", rows=[{"text": "x"}, "y"])))
    assert rows[1].fault is not None
    assert rows[1].fault.kind == "wrong-type"


def test_columns_are_renamed():
    rows = [{"question": "q", "answer": "a", "id": 1}]
    source = Source("m", rows=rows, columns={"prompt": "question", "completion": "answer"})
    assert read(source) == [{"prompt": "q", "completion": "a", "id": 1}]


def test_columns_can_swap_names():
    source = Source("m", rows=[{"a": 1, "b": 2}], columns={"a": "b", "b": "a"})
    assert read(source) == [{"a": 2, "b": 1}]


def test_a_mapped_column_that_is_missing_lists_those_there_are():
    source = Source("m", rows=[{"question": "q", "answer": "a"}], columns={"prompt": "questoin"})
    with pytest.raises(DataError, match="`question`, `answer`") as caught:
        read(source)
    assert caught.value.hint == "did you mean question?"


def test_limit_keeps_the_first_rows():
    assert read(Source("m", rows=[{"n": n} for n in range(5)], limit=2)) == [{"n": 0}, {"n": 1}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "no rows"),
        ("a.jsonl", "\n\n", "no rows"),
        ("a.json", "", "no rows"),
        ("a.json", "[]", "no rows"),
        ("a.csv", "text\n", "no rows"),
        ("a.json", "[{]", "line 1, column 3"),
        ("a.json", '{"text": "x"}\n{"text": "y"', "line 2, column 13"),
        ("a.json", '[{"text": "x"}] []', "Extra data at line 1, column 17"),
        ("a.json", '[{"text": "x"}', "no end"),
        ("a.json", '{"a": [], "b": []}', "2 lists"),
        ("a.json", b"\xff[]", "UTF-8"),
        ("a.parquet", "no parquet", "Parquet"),
        ("a.txt", "text", "can't read .txt"),
    ],
)
def test_files_that_hold_no_rows_are_refused(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / name, content))
    assert caught.value.where == name


def test_a_missing_file_suggests_a_near_name(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no such file") as caught:
        read(Source("trian.jsonl", path=tmp_path / "trian.jsonl"))
    assert str(tmp_path / "train.jsonl") in caught.value.hint


def test_a_folder_is_refused_and_its_files_named(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(DataError, match="folder") as caught:
        read(Source("data", path=tmp_path))
    assert "data/*" in caught.value.hint


def test_a_mapping_of_splits_is_refused():
    with pytest.raises(DataError, match="`train`, `test`"):
        Source("m", rows={"train": [], "test": []})


def test_paths_are_looked_for_here_then_beside_the_recipe(tmp_path, monkeypatch):
    here, beside = tmp_path / "here", tmp_path / "beside"
    for folder in (here, beside):
        folder.mkdir()
    monkeypatch.chdir(here)
    (beside / "a.jsonl").touch()
    assert resolve_path("a.jsonl", beside) == beside / "a.jsonl"
    (here / "a.jsonl").touch()
    assert resolve_path("a.jsonl", beside) == Path("a.jsonl")
    assert resolve_path("nowhere.jsonl", beside) == Path("nowhere.jsonl")


def test_content_hash_follows_the_content(tmp_path):
    first = content_hash(write(tmp_path / "a.jsonl", "{}"))
    assert content_hash(write(tmp_path / "b.jsonl", "{}")) == first
    assert content_hash(write(tmp_path / "a.jsonl", "{} ")) != first
    in_memory = content_hash(Source("m", rows=[{"a": 1, "b": 2}]))
    assert content_hash(Source("n", rows=[{"b": 2, "a": 1}])) == in_memory
    assert content_hash(Source("n", rows=[{"b": 2, "a": 3}])) != in_memory
