"""Format detection: which format a row has, and the example that it stands for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

from tunesmith.data.fields.table import COLUMNS, FORMATS, MASKS
from tunesmith.data.formats.dialects import alpaca, preference, sharegpt, with_system
from tunesmith.data.formats.examples import (
    Example,
    Parts,
    TemplatedText,
    Text,
    Tokens,
    prompt_completion,
    read_chat,
    read_weight,
)
from tunesmith.data.row_errors import listing, refuse, wrong_type

_NOT_LEARNED = {"rejected", "attention_mask"}
CONTENT = tuple(
    dict.fromkeys(name for read in COLUMNS.values() for name in read if name not in _NOT_LEARNED)
)
"""Columns that are learned from; others, such as an id, don't make a row another row."""

REWRITTEN: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "sharegpt": sharegpt,
    "preference": preference,
    "alpaca": alpaca,
}
"""Formats that are read by being rewritten as messages or as prompt and completion."""

_IGNORED = -100


def detect_format(values: Mapping[str, Any]) -> str | None:
    """The first format whose columns all hold something, else the first whose columns all exist."""
    for name, columns in FORMATS.items():
        if all(values.get(column) is not None for column in columns):
            return name
    for name, columns in FORMATS.items():
        if all(column in values for column in columns):
            return name
    return None


def to_example(values: Mapping[str, Any], *, format: str, templated: bool = True) -> Example:
    """The example a row stands for.

    With `templated`, string prompt and completion become a user and an assistant turn; without,
    they stay raw.

    Raises:
        RowError: a column is missing or has the wrong type.
    """
    for column in FORMATS[format]:
        if format != "preference" and values.get(column) is None:
            state = "null" if column in values else "missing"
            refuse(
                "missing-column",
                f"column `{column}` is {state}; the row has {listing(values)}",
                f"name the right column: data.columns={{{column}: ...}}",
            )
    if format in REWRITTEN:
        values = REWRITTEN[format](values)
        format = "messages" if "messages" in values else "prompt_completion"
    if format == "messages":
        return read_chat(with_system(values, "messages"))
    if format == "prompt_completion":
        return prompt_completion(with_system(values, "prompt", templated), templated=templated)
    if format == "segments":
        return _parts(values["segments"])
    if format == "tokens":
        return _tokens(values)
    text = values["text"]
    if not isinstance(text, str):
        wrong_type("text", "a string", text)
    if not text:
        refuse("empty-text", "`text` is empty", "take the row out")
    return Text(text) if format == "text" else TemplatedText(text)


def _parts(value: Any) -> Parts:
    """`segments`: {text, train} each; `label` is another name of `train`."""
    if not isinstance(value, list | tuple):
        wrong_type("segments", "a list of segments", value)
    parts: list[tuple[str, bool]] = []
    for at, item in enumerate(cast("list[Any]", value)):
        place = f"segments[{at}]"
        if not isinstance(item, Mapping):
            wrong_type(place, "an object with text and train", item)
        segment = cast("Mapping[str, Any]", item)
        text, train = segment.get("text"), segment.get("train", segment.get("label"))
        if not isinstance(text, str):
            wrong_type(f"{place}.text", "a string", text)
        if not isinstance(train, bool):
            wrong_type(f"{place}.train", "true or false", train)
        parts.append((text, train))
    if not any(text for text, _ in parts):
        refuse("empty-text", "`segments` hold no text", "take the row out")
    return Parts(tuple(parts))


def _tokens(values: Mapping[str, Any]) -> Tokens:
    """`input_ids` with `labels`, or with a mask of 0 and 1, and with a weight for each id; without
    any of them everything is learned.
    """
    ids = _numbers(values, "input_ids")
    if not ids:
        refuse("empty-text", "`input_ids` is empty", "take the row out")
    seen = values.get("attention_mask")
    if seen is not None and not all(_numbers(values, "attention_mask", len(ids))):
        refuse("padding", "`attention_mask` has zeros: the ids hold padding", "take it out")
    learned = _learned(values, ids)
    if values.get("weights") is None:
        return Tokens(ids, learned)
    weights = _entries(values, "weights", len(ids), kinds=(int, float), what="a list of numbers")
    found = tuple(read_weight(weight, f"weights[{at}]") for at, weight in enumerate(weights))
    marks = tuple(one and weight > 0 for one, weight in zip(learned, found, strict=True))
    return Tokens(ids, marks, found)


def _learned(values: Mapping[str, Any], ids: tuple[int, ...]) -> tuple[bool, ...]:
    """Which ids `labels` or a mask marks."""
    learned: dict[str, tuple[bool, ...]] = {}
    if values.get("labels") is not None:
        labels = _numbers(values, "labels", len(ids))
        for at, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (_IGNORED, token):
                refuse(
                    "labels-mismatch",
                    f"`labels[{at}]` is {label}, `input_ids[{at}]` is {token}",
                    f"a label is the id at its own place, or {_IGNORED} where nothing is learned; "
                    "they are not shifted",
                )
        learned["labels"] = tuple(label != _IGNORED for label in labels)
    for name in MASKS:
        if values.get(name) is not None:
            mask = _numbers(values, name, len(ids), booleans=True)
            if set(mask) - {0, 1}:
                wrong_type(name, "a list of 0 and 1", max(mask))
            learned[name] = tuple(one == 1 for one in mask)
    if len(set(learned.values())) > 1:
        refuse(
            "conflicting-wishes",
            f"{' and '.join(f'`{name}`' for name in learned)} mark different ids",
            "take out the one that is not meant",
        )
    return next(iter(learned.values()), (True,) * len(ids))


def _numbers(
    values: Mapping[str, Any], column: str, length: int | None = None, *, booleans: bool = False
) -> tuple[int, ...]:
    kinds = (int, bool) if booleans else (int,)
    found = _entries(values, column, length, kinds=kinds, what="a list of whole numbers")
    return tuple(int(one) for one in found)


def _entries(
    values: Mapping[str, Any],
    column: str,
    length: int | None,
    *,
    kinds: tuple[type, ...],
    what: str,
) -> tuple[Any, ...]:
    """The column's list, one entry of these types for each id."""
    value = values[column]
    if not isinstance(value, list | tuple):
        wrong_type(column, what, value)
    found = tuple(cast("list[Any]", value))
    odd = [one for one in found if type(one) not in kinds]
    if odd:
        wrong_type(column, what, odd[0])
    if length is not None and len(found) != length:
        refuse(
            "wrong-length",
            f"`{column}` has {len(found)} entries, `input_ids` {length}",
            "both have one entry a token; a mask that stands one place off is not shifted here",
        )
    return found
