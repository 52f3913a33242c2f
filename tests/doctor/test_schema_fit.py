"""Arguments against schemas, one rule at a time."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.doctor.schema_fit import misfits

OBJECT = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "share": {"type": "number"},
        "exact": {"type": "boolean"},
        "unit": {"enum": ["c", "f"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "maybe": {"type": ["string", "null"]},
        "fixed": {"const": 3},
    },
    "required": ["city"],
}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"days": 3, "share": 1, "exact": False, "unit": "c", "tags": ["a", "b"]},
        {"days": 3.0, "share": 0.5, "place": {"x": 2}, "either": 4, "maybe": None, "fixed": 3},
        {"either": "x", "tags": []},
        {"days": None},
    ],
)
def test_what_fits_has_no_misfits(fields: dict[str, Any]) -> None:
    assert list(misfits({"city": "Oslo", **fields}, OBJECT)) == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"city": 5}, "city is 5, not of type string"),
        ({"city": None}, "city is None, not of type string"),
        ({"days": "3"}, "days is '3', not of type integer"),
        ({"days": 3.5}, "days is 3.5"),
        ({"days": True}, "days is True"),
        ({"share": "half"}, "share is 'half'"),
        ({"exact": 1}, "exact is 1"),
        ({"unit": "k"}, "unit is 'k', not one of 'c', 'f'"),
        ({"tags": "a"}, "tags is 'a', not of type array"),
        ({"tags": ["a", 2]}, "tags[1] is 2"),
        ({"place": {}}, "place.x is required"),
        ({"place": {"x": "1"}}, "place.x is '1'"),
        ({"either": [1]}, "either fits none"),
        ({"fixed": 4}, "fixed is 4, not 3"),
        ({"town": "x"}, "town is no parameter; there are city, days"),
    ],
)
def test_each_misfit_is_said_once_with_its_place(fields: dict[str, Any], said: str) -> None:
    found = list(misfits({"city": "Oslo", **fields}, OBJECT))
    assert len(found) == 1
    assert said in found[0]


def test_missing_required_parameter() -> None:
    assert list(misfits({}, OBJECT)) == ["city is required and missing"]


def test_unlisted_parameters_where_the_schema_allows_them() -> None:
    properties = {"a": {"type": "string"}}
    value = {"a": "x", "b": 1}
    assert list(misfits(value, {"properties": properties, "additionalProperties": True})) == []
    assert list(misfits(value, {"type": "object"})) == []
    typed = {"properties": properties, "additionalProperties": {"type": "string"}}
    assert list(misfits(value, typed)) == ["b is 1, not of type string"]
    closed = {"properties": {}, "additionalProperties": False}
    assert len(list(misfits(value, closed))) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("dict", {}), ("float", 1.5), ("tuple", [1]), ("str", "x"), ("any", object()), (None, 3)],
)
def test_types_named_as_in_other_languages(name: str | None, value: Any) -> None:
    assert list(misfits(value, {"type": name})) == []


@pytest.mark.parametrize("schema", [None, [], "string", {"type": "object", "properties": []}])
def test_a_schema_that_is_none_allows_everything(schema: Any) -> None:
    assert list(misfits({"a": 1}, schema)) == []


def test_a_schema_that_holds_itself_ends() -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {}}
    schema["properties"]["next"] = schema
    value: dict[str, Any] = {}
    value["next"] = value
    assert list(misfits(value, schema)) == []
