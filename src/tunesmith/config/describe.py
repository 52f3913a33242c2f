"""The recipe described: as a JSON schema, and as a starter recipe with every key explained."""

from __future__ import annotations

from typing import Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tunesmith.config.dump import plain_default
from tunesmith.config.schema import MAIN_KEYS, Recipe


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, short forms included."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    one: dict[str, Any] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/SourceSection"}]}
    sources = {"anyOf": [*one["anyOf"], {"type": "array", "items": one}]}
    data = definitions["DataSection"]["properties"]
    data["train"] = {**_without_type(data["train"]), **sources}
    data["eval"]["anyOf"] = [
        {"type": "string", "pattern": "^[0-9.]+ ?%$"},
        {"type": "integer", "minimum": 1},
        *sources["anyOf"],
        {"type": "object", "additionalProperties": sources},
        {"type": "null"},
    ]
    trackers = definitions["LogSection"]["properties"]["to"]
    trackers["anyOf"] = [trackers["items"], {"type": "array", "items": trackers["items"]}]
    definitions["LogSection"]["properties"]["to"] = _without_type(trackers)
    for name, section in schema["properties"].items():
        reference = section.pop("$ref", None) or section.pop("allOf")[0]["$ref"]
        properties = definitions[reference.rsplit("/", 1)[-1]]["properties"]
        short = {**properties[MAIN_KEYS[name]], "title": f"{name}.{MAIN_KEYS[name]}"}
        section["anyOf"] = [{"$ref": reference}, short, {"type": "null"}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _without_type(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in ("type", "items")}


def starter_recipe(*, model: str | None = None, data: list[str] | None = None) -> str:
    """A recipe with the model and data given and every other key as a comment with its default."""
    lines = [
        "# A recipe of tunesmith. Keys that are commented out show their default: take the # away",
        "# to change one. `tunesmith preview` shows what is learned, `tunesmith train` does it.",
    ]
    given: dict[tuple[str, str], Any] = {("model", "name"): model, ("data", "train"): data}
    for name, info in Recipe.model_fields.items():
        lines += ["", f"# {_sentence(info)}"]
        section = cast("type[BaseModel]", info.annotation)
        required = [key for owner, key in given if owner == name]
        lines.append(f"{name}:")
        for key, field in section.model_fields.items():
            lines += _field_lines(key, field, given.get((name, key)), required=key in required)
    return "\n".join(lines) + "\n"


def _field_lines(key: str, field: FieldInfo, value: Any, *, required: bool) -> list[str]:
    choices = _choices(field.annotation)
    meaning = (field.description or "") + (f" [{' | '.join(choices)}]" if choices else "")
    if required:
        shown = "" if value is None else f" {_inline(value)}"
        return [f"  {key}:{shown}  # {meaning}"]
    default = _inline(plain_default(field))
    return [f"  # {key}: {default}  # {meaning}"]


def _sentence(info: FieldInfo) -> str:
    text = info.description or ""
    return f"{text[:1].upper()}{text[1:]}."


def _inline(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").removesuffix("\n")


def _choices(annotation: Any) -> list[str]:
    """The words a field takes; none where it takes other things too."""
    if get_origin(annotation) is Literal:
        words = [str(word) for word in get_args(annotation)]
        return words if len(words) > 1 else []
    return []
