"""Files and objects of pyarrow, datasets, pandas and json are read as those libraries give them."""

from __future__ import annotations

import json

import pytest

from tunesmith.data.sources.files import folder_files
from tunesmith.data.sources.sources import Source, content_hash, read_rows
from tunesmith.errors import DataError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")

TEXT = 'I say "hi"\nto you \\ and ü'
MIXED = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": TEXT}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "b"}]},
                  {"role": "assistant", "content": "yes"}]},
]  # fmt: skip


def read(path=None, **options):
    source = Source("x", path=path, **options)
    return [row.values if row.values is not None else row.fault.kind for row in read_rows(source)]


def without_nulls(value):
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def expected(rows):
    return [{key: without_nulls(value) for key, value in row.items()} for row in rows]


@pytest.fixture
def mixed():
    if "on_mixed_types" not in datasets.Dataset.from_list.__code__.co_varnames:
        pytest.skip("this version of datasets has no Json type")
    return datasets.Dataset.from_list(MIXED, on_mixed_types="use_json")


def test_json_values_are_what_datasets_gives_back(mixed, tmp_path):
    mixed.to_parquet(tmp_path / "x.parquet")
    mixed.save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert expected(list(mixed)) == MIXED
    assert read(tmp_path / "x.parquet") == MIXED
    assert read(arrow) == MIXED
    assert read(rows=mixed) == MIXED


def test_lists_structs_and_maps_of_json_are_parsed(tmp_path):
    kind = pa.json_()
    stored = pa.array(["[1, null]", '"x"', None, '{"a": "\\""}'], pa.string())
    flat = pa.ExtensionArray.from_storage(kind, stored)
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 4]), flat)
    structs = pa.StructArray.from_arrays([lists], ["deep"])
    keys = pa.array(["a", "b", "c", "d"])
    maps = pa.MapArray.from_arrays(pa.array([0, 1, 4], pa.int32()), keys, flat)
    table = pa.table({"lists": lists, "structs": structs, "maps": maps})
    pa.parquet.write_table(table, tmp_path / "x.parquet")
    rows = read(tmp_path / "x.parquet")
    assert [row["lists"] for row in rows] == [[[1, None], "x"], [None, {"a": '"'}]]
    assert [row["structs"]["deep"] for row in rows] == [[[1, None], "x"], [None, {"a": '"'}]]
    assert [row["maps"] for row in rows] == [
        [("a", [1, None])],
        [("b", "x"), ("c", None), ("d", {"a": '"'})],
    ]
    assert read(rows=table) == rows


@pytest.mark.parametrize(
    "kind",
    ["large_string", "string_view", "dictionary", "list_of_dictionary", "large_list"],
)
def test_dictionary_and_large_types_are_plain_values(kind, tmp_path):
    texts = ["a", "b", "a", None]
    column = {
        "large_string": lambda: pa.array(texts, pa.large_string()),
        "string_view": lambda: pa.array(texts, pa.string_view()),
        "dictionary": lambda: pa.array(texts).dictionary_encode(),
        "list_of_dictionary": lambda: pa.array(
            [["a", None], [], None, ["b"]], pa.list_(pa.dictionary(pa.int32(), pa.string()))
        ),
        "large_list": lambda: pa.array([["a"], [], None, ["b", "c"]], pa.large_list(pa.string())),
    }[kind]()
    table = pa.table({"text": column})
    with (
        pa.OSFile(str(tmp_path / "x.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as out,
    ):
        out.write_table(table)
    assert read(tmp_path / "x.arrow") == table.to_pylist()


def test_structs_that_are_filled_with_null_lose_only_what_was_filled(tmp_path):
    rows = [
        {"tools": [{"name": "f", "args": {"a": "x"}}], "text": "t"},
        {"tools": [{"name": "g", "args": {"b": 1}}], "text": None},
    ]
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == rows
    assert read(rows=data) == rows


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow", None])
def test_data_sets_in_any_output_format_give_python_values(form):
    rows = [{"input_ids": [1, 2, 3], "text": "a"}, {"input_ids": [4], "text": "b"}]
    data = datasets.Dataset.from_list(rows).with_format(form)
    assert read(rows=data) == rows


def test_data_frames_and_numpy_cells():
    pandas = pytest.importorskip("pandas")
    numpy = pytest.importorskip("numpy")
    frame = pandas.DataFrame(
        {"prompt": ["a", None], "input_ids": [numpy.array([1, 2]), [3]], "n": [1.5, float("nan")]}
    )
    rows = [
        {"prompt": "a", "input_ids": [1, 2], "n": 1.5},
        {"prompt": None, "input_ids": [3], "n": None},
    ]
    assert read(rows=frame) == rows
    cells = [{"prompt": numpy.str_("a"), "input_ids": numpy.array([1, 2]), "n": numpy.float64(1.5)}]
    assert json.dumps(read(rows=cells)) == json.dumps(rows[:1])
    assert content_hash(Source("x", rows=frame)) == content_hash(Source("x", rows=rows))
    twice = pandas.DataFrame([["a", "b"]], columns=["text", "text"])
    with pytest.raises(DataError, match="`text` is there 2 times"):
        read(rows=twice)


@pytest.mark.parametrize("ending", ["csv", "parquet", "arrow"])
def test_a_column_named_twice_is_refused(ending, tmp_path):
    path = tmp_path / f"x.{ending}"
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    if ending == "csv":
        path.write_text("text,text\na,b\n")
    elif ending == "parquet":
        pa.parquet.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
            out.write_table(table)
    with pytest.raises(DataError, match="`text` is there 2 times"):
        read(path)


def test_a_json_column_named_twice_is_a_fault_of_its_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"text": "a", "text": "b"}\n{"text": "\\"text\\": c"}\n{"a": {"text": 1}, "text": "b"}\n'
    )
    assert read(path) == ["doubled-column", {"text": '"text": c'}, {"a": {"text": 1}, "text": "b"}]


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "a", "completion": "b", "references": [{"prompt": "old", "completion": "x"}]}


@pytest.mark.parametrize("row", [CHAT, PAIR, {"instruction": "a", "output": "b", "history": []}])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_with_one_object_is_one_row(row, indent, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(row, indent=indent))
    assert read(path) == [row]
    path.write_text(json.dumps({"data": [row, row], "version": 1}, indent=indent))
    assert read(path) == [row, row]
    path.write_text(json.dumps({"messages": [CHAT, CHAT]}, indent=indent))
    assert read(path) == [CHAT, CHAT]


def test_one_object_is_a_row_under_the_recipes_names_too(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"q": "a", "a": "b", "more": [{"x": 1}]}))
    found = read(path, columns={"prompt": "q", "completion": "a"})
    assert found == [{"more": [{"x": 1}], "prompt": "a", "completion": "b"}]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_in_a_jsonl_file_is_its_rows(indent, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n" + json.dumps([CHAT, PAIR], indent=indent) + "\n")
    assert read(path) == [CHAT, PAIR]
    path.write_text('["a"]\n{"text": "b"}\n')
    assert read(path) == ["invalid-json", {"text": "b"}]


def test_the_folder_of_a_dataset_dict_is_read_by_the_hint_that_is_given(tmp_path):
    rows = {name: [{"text": name}] for name in ("sft", "rl", "hard cases")}
    made = {name: datasets.Dataset.from_list(some) for name, some in rows.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match="several splits: sft, rl, hard cases") as raised:
        folder_files("saved", tmp_path / "saved")
    assert "'data.train={path: saved, split: sft}'" in str(raised.value.hint)
    for name, some in rows.items():
        ((_, path),) = folder_files("saved", tmp_path / "saved", split=name)
        assert read(path) == some
    with pytest.raises(DataError, match="no split dpo; there are: sft, rl, hard cases"):
        folder_files("saved", tmp_path / "saved", split="dpo")
