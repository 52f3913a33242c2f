"""A recipe as plain values and as YAML, and what two recipes differ in."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import yaml
from pydantic.fields import FieldInfo

from tunesmith.config.schema import SCIENCE, Duration, Holdout, Recipe
from tunesmith.config.sections.model import fits


class Difference(NamedTuple):
    """A key that two recipes give different values; None where one of them lacks it."""

    key: str
    old: Any
    new: Any

    @property
    def section(self) -> str:
        """The recipe's section that holds the key."""
        return self.key.split(".", 1)[0]


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON values; reads back as an equal recipe."""
    values = recipe.model_dump(mode="json")
    # keys that have no effect on this kind would be refused
    values["adapter"] = {
        key: value
        for key, value in values["adapter"].items()
        if value is not None and fits(key, recipe.adapter.kind)
    }
    return values


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, every value written out in the schema's order; reads back equal."""
    return yaml.dump(to_plain(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def science_dict(recipe: Recipe) -> dict[str, Any]:
    """The sections that decide what is learned, as plain values."""
    values = to_plain(recipe)
    return {name: values[name] for name in SCIENCE}


def differences(old: Recipe, new: Recipe) -> list[Difference]:
    """The dotted keys in which two recipes differ, in the schema's order."""
    before, after = _flatten(to_plain(old)), _flatten(to_plain(new))
    keys = dict.fromkeys([*before, *after])
    return [
        Difference(key, before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key)
    ]


def changed_sections(found: list[Difference]) -> list[str]:
    """The sections that the differences lie in, each once."""
    return list(dict.fromkeys(difference.section for difference in found))


def plain_default(field: FieldInfo) -> Any:
    """A field's default as a recipe writes it."""
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Duration | Holdout):
        return default.plain()
    return list(cast("tuple[Any]", default)) if isinstance(default, tuple) else default


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = list(cast("dict[str, Any]", value).items())
    elif isinstance(value, list):
        items = [(str(i), item) for i, item in enumerate(cast("list[Any]", value))]
    else:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        flat |= _flatten(item, f"{key}.{name}" if key else name)
    return flat


class _Dumper(yaml.SafeDumper):
    """Writes every value out where it stands, never as an alias of an equal one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
