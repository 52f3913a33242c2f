"""Whatever is wrong with a row or a file is said with a hint on how to mend it, and where it is."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tunesmith
from tiny import tiny_tokenizer, write_jsonl
from tunesmith.config.read import read_recipe
from tunesmith.data.formats.detect import COLUMNS, to_example
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.row_errors import RowError
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import DataError, RecipeError

ROOT = Path(tunesmith.__file__).parent
ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
JUNK: list[Any] = [
    7, True, "", "text", [], [7], [None], ["text"], {}, [{}], [[]], [["a", "b"]], {"a": 1},
    [{"role": "user"}], [{"role": 3, "content": "a"}], [{**ASK, "train": 1}],
    [{**ASK, "weight": "x"}], [{**ASK, "weight": -1}], [{**SAY, "content": [{"type": "image"}]}],
    [{**SAY, "content": [7]}], [{**SAY, "content": 7}], [{**SAY, "tool_calls": 7}],
    [{**SAY, "tool_calls": [7]}], [{**SAY, "tool_calls": [{"name": 7}]}],
    [{**SAY, "tool_calls": [{"function": 7}]}], [{**SAY, "reasoning_content": 7}],
    [{**SAY, "tool_calls": [{"name": "f", "arguments": "{'a': 1}"}]}],
    [{**SAY, "tool_calls": [{"name": "f", "arguments": [1]}]}],
    [{"from": "narrator", "value": "a"}], [{"from": "gpt", "value": 7}],
    [{"from": "function_call", "value": "no JSON"}], [{"from": "function_call", "value": 7}],
    [{"text": 7, "train": True}], [{"text": "a", "train": 7}], [{"text": "", "train": True}],
    [1, 2], [1, "a"], [1, 2, 3], [2, 1], [0, 1], [ASK, SAY],
]  # fmt: skip
GOOD: dict[str, Any] = {
    "messages": [ASK, SAY],
    "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}],
    "input_ids": [1, 2],
    "segments": [{"text": "a", "train": True}],
    "chosen": [ASK, SAY],
    "rejected": [ASK, {**SAY, "content": "5"}],
    "prompt": "2+2?",
    "completion": "4",
    "instruction": "2+2?",
    "output": "4",
    "text": "a",
}


def bad_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of each format with one column filled with something else, or with nothing."""
    for format, columns in COLUMNS.items():
        good = {name: GOOD[name] for name in columns if name in GOOD}
        for column in columns:
            yield format, {name: value for name, value in good.items() if name != column}
            for junk in JUNK:
                yield format, {**good, column: junk}
    yield "preference", {"chosen": [ASK], "rejected": [ASK]}


def test_every_bad_row_is_a_fault_with_a_hint():
    kinds: dict[str, int] = {}
    for format, row in bad_rows():
        try:
            to_example(row, format=format)
        except RowError as error:
            fault = error.fault
            assert fault.hint, (format, row, fault)
            assert "`" in fault.message, fault
            kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
    assert set(kinds) >= {
        "wrong-type", "missing-column", "empty-messages", "unknown-role", "empty-answer",
        "empty-text", "wrong-length", "padding", "labels-mismatch", "no-answer",
    }  # fmt: skip
    assert kinds["wrong-type"] > 500


LINES = ['{"text": 1', "7", '{"text": "\\ud83d"}', b"\xff\n", "[" * 100_000]


@pytest.mark.parametrize("line", LINES, ids=["cut", "number", "surrogate", "latin", "deep"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_unreadable_row_or_file_has_a_hint_and_a_place(tmp_path, suffix, line):
    path = tmp_path / f"rows{suffix}"
    content = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(b'a,b\n1,2,3\n"' + content if suffix == ".csv" else content)
    refused: DataError | None = None
    faults = []
    try:
        rows = list(read_rows(Source(str(path), path=path)))
    except DataError as error:
        refused = error
    else:
        faults = [row.fault for row in rows if row.fault is not None]
    assert faults or (refused and refused.where and refused.hint), refused
    assert all(fault.hint for fault in faults), faults


def test_the_refusal_of_bad_rows_names_the_file_and_hints(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": [ASK, SAY]}, {"messages": 7}])
    source = Source(str(path), path=path)
    with pytest.raises(DataError) as caught:
        prepare([source], wrap_tokenizer(tiny_tokenizer()), max_length=None)
    assert caught.value.where == str(path)
    assert caught.value.hint
    assert "mend it: it is written like [" in caught.value.message


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": {"name": "m"}, "data": {"train": "d.jsonl"}, "optim": {"lr": "fast"}},
        {"model": {"name": "m"}, "data": {"train": "d.jsonl"}, "train": {"epochs": -1}},
        {"model": {"name": "m"}, "data": {"train": "d.jsonl"}, "trian": {}},
        {"data": {"train": 7}, "batch": 7},
    ],
    ids=json.dumps,
)
def test_every_wrong_recipe_has_a_hint(recipe):
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe)
    assert caught.value.hint


def _calls() -> Iterator[tuple[str, str, ast.Call]]:
    for folder in ("data", "config"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node.func.id, node


def test_every_fault_and_error_in_the_source_has_its_hint():
    bare = []
    for place, name, call in _calls():
        given = {keyword.arg for keyword in call.keywords}
        if name in ("Fault", "refuse") and len(call.args) < 3 and "hint" not in given:
            bare.append(place)
        if name in ("DataError", "RecipeError", "ModelError") and not {"where", "hint"} <= given:
            bare.append(place)
    assert not bare
