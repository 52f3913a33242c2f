"""One map says which columns each format is read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tunesmith.data.formats.detect import COLUMNS, CONTENT, FORMATS, to_example

TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
SAID = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
ROWS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"conversations": SAID, "system": "S"},
    "tokens": {"input_ids": [1, 2], "labels": [-100, 2], "attention_mask": [1, 1]},
    "segments": {"segments": [{"text": "a", "train": True}]},
    "preference": {"chosen": TURNS, "rejected": [TURNS[0]], "prompt": None},
    "prompt_completion": {"prompt": "1+1?", "completion": "2"},
    "alpaca": {"instruction": "1+1?", "input": "x", "output": "2", "history": [], "system": "S"},
    "text": {"text": "a"},
    "templated_text": {"text": "a"},
}


class Watched(Mapping[str, Any]):
    """A row that remembers which of its columns were asked for."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values_of = values
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values_of[key]

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a row is read column by column")

    def __len__(self) -> int:
        return len(self.values_of)


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_read_from_the_columns_of_the_map_and_from_all_of_them(format):
    row = Watched(ROWS[format])
    to_example(row, format=format)
    assert row.asked == set(COLUMNS[format])


def test_every_format_has_its_columns_and_needs_some_of_them():
    assert list(COLUMNS) == list(FORMATS)
    assert all(set(FORMATS[format]) <= set(COLUMNS[format]) for format in FORMATS)


def test_all_that_is_learned_from_counts_as_content():
    columns = {name for read in COLUMNS.values() for name in read}
    assert columns - set(CONTENT) == {"rejected", "attention_mask"}
    assert len(CONTENT) == len(set(CONTENT))
