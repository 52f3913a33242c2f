"""Tools and calls in every shape that data has them in are one chat to the template."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_document_store import same

from template_oracle import NAMES, compare, template_of
from tunesmith.data.formats.detect import to_example
from tunesmith.data.rendering.render import render_example
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.types import Document, Origin

pytestmark = pytest.mark.skipif(not NAMES, reason="trl, whose templates these are, is missing")
TEMPLATES = ["qwen3", "qwen2_5", "llama3_1", "llama3_2"]

WEATHER = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "Where."}},
        "required": ["city"],
    },
}
ADD = {
    "name": "add",
    "description": "Adds numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer", "default": 1}},
    },
}
TOOLS = [{"type": "function", "function": tool} for tool in (WEATHER, ADD)]
SHAPES: dict[str, Any] = {
    "bare": [WEATHER, ADD],
    "bare, one of them": [TOOLS[0], ADD],
    "flat with a type": [{"type": "function", **tool} for tool in (WEATHER, ADD)],
    "without a type": [{"function": tool} for tool in (WEATHER, ADD)],
    "a type that is null": [{"type": None, "function": tool} for tool in (WEATHER, ADD)],
    "JSON": json.dumps(TOOLS),
    "JSON, bare": json.dumps([WEATHER, ADD], indent=2),
}
ARGUMENTS = {"city": "Zürich", "days": 2, "hourly": True}


def messages(arguments: Any = ARGUMENTS, *, bare_call: bool = False) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": arguments}
    call = function if bare_call else {"id": "c0", "type": "function", "function": function}
    return [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "get_weather", "tool_call_id": "c0", "content": '{"rain": 0}'},
        {"role": "assistant", "content": "No."},
    ]


def document(row: dict[str, Any], name: str) -> Document:
    example = to_example(row, format="messages")
    found = render_example(example, template_of(name), origin=Origin("made", 0)).document
    assert found is not None
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_of_any_shape_are_those_of_inference(name, shape):
    row = {"messages": messages(), "tools": SHAPES[shape]}
    assert same(document(row, name), document({**row, "tools": TOOLS}, name))
    verdict = compare(row, template_of(name), row["messages"], TOOLS)
    assert not verdict.wrong
    assert verdict.turns == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_arguments_as_json_are_the_object(name):
    expected = document({"messages": messages(), "tools": TOOLS}, name)
    for text in (json.dumps(ARGUMENTS), json.dumps(ARGUMENTS, ensure_ascii=False, indent=1)):
        assert same(document({"messages": messages(text), "tools": TOOLS}, name), expected)


@pytest.mark.parametrize("name", TEMPLATES)
def test_nulls_that_columns_fill_in_are_taken_out(name, tmp_path: Path):
    other = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    rows = [
        {"messages": messages(), "tools": [TOOLS[0]]},
        {"messages": messages(), "tools": [TOOLS[1]]},
        {"messages": other, "tools": None},
    ]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(copy.deepcopy(rows)), path)
    filled = pq.read_table(path).to_pylist()
    assert None in filled[0]["tools"][0]["function"]["parameters"]["properties"].values()
    read = [row.values for row in read_rows(Source("rows", path=path))]
    for found, expected in zip(read, rows, strict=True):
        assert found is not None
        assert same(document(found, name), document(expected, name))


def test_what_is_no_function_stays_as_it_is():
    search = {"type": "web_search", "name": "search"}
    example = to_example({"messages": messages(), "tools": [search]}, format="messages")
    assert example.tools == [search]
