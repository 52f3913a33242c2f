"""The recipe's surface: its keys, that each is explained, its JSON schema and the starter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tunesmith.config.describe import recipe_schema, starter_recipe
from tunesmith.config.names import known_keys
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import MAIN_KEYS, SCIENCE, Recipe, SourceSection
from tunesmith.errors import RecipeError

KEYS = {
    "model": "name dtype quantization double_quantization float8 revision trust_remote_code",
    "data": "train mix_by mix_stop eval columns roles ignore_fields template template_kwargs "
    "train_on max_length too_long bad_rows shuffle",
    "batch": "documents tokens packing pack_tokens group_by_prefix",
    "objective": "name label_smoothing z_loss entropy kl alpha eps_low eps_high outer_steps "
    "warmup_epochs neftune router_aux scheduled_sampling",
    "adapter": "kind rank alpha dropout targets rank_pattern alpha_pattern rotation_size "
    "svd_iterations lr_ratio continue_from parameters top_layers",
    "optim": "name lr betas momentum eps weight_decay lr_factors schedule min_lr decay warmup "
    "max_grad_norm",
    "train": "epochs steps seed result non_finite",
    "device": "kind micro_tokens share_prefixes attention kernels compile gradient_checkpointing "
    "activation_offload paged_optimizer deterministic "
    "threads watchdog cache num_proc ranks rank_timeout context_parallel tensor_parallel shard "
    "shard_offload",
    "checkpoint": "every keep background",
    "eval": "every samples max_new_tokens",
    "log": "to project spike_loss spike_grad_norm on_spike",
}


def test_keys_are_frozen() -> None:
    assert {name: " ".join(keys) for name, keys in known_keys().items()} == KEYS
    assert " ".join(SourceSection.model_fields) == (
        "path subset split revision format columns roles ignore_fields weight epochs limit"
    )


def test_every_field_says_what_it_means() -> None:
    for section in [Recipe, SourceSection, *(i.annotation for i in Recipe.model_fields.values())]:
        assert section is not None
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_main_keys_and_science_name_what_exists() -> None:
    assert set(MAIN_KEYS) == set(KEYS)
    assert all(key in known_keys()[section] for section, key in MAIN_KEYS.items())
    assert set(SCIENCE) < set(KEYS)


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(references(item) for item in value))
    return set()


def test_json_schema_refers_only_to_what_it_defines() -> None:
    schema = json.loads(json.dumps(recipe_schema()))
    assert references(schema) <= {f"#/$defs/{name}" for name in schema["$defs"]}
    assert set(schema["properties"]) == set(KEYS)
    assert schema["additionalProperties"] is False


KINDS = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
    "object": dict, "null": type(None),
}  # fmt: skip


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether the value fits: the keywords of JSON schema that ours uses, and no others."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rsplit("/", 1)[-1]], value, root)
    if "anyOf" in schema:
        return any(accepts(option, value, root) for option in schema["anyOf"])
    if "type" in schema and not isinstance(value, KINDS[schema["type"]]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if isinstance(value, str) and "pattern" in schema:
        return re.search(schema["pattern"], value) is not None
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if isinstance(value, dict) and "properties" in schema:
        inner = schema["properties"]
        return (set(schema.get("required", ())) <= set(value) <= set(inner)) and all(
            accepts(inner[key], item, root) for key, item in value.items()
        )
    return True


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": "M", "data": "a.jsonl"},
        {"model": {"name": "M"}, "data": {"train": ["a", {"path": "b"}], "eval": "2%"}},
        {"model": "M", "adapter": "lora", "log": ["wandb"], "optim": None},
        {"model": "M", "log": "wandb"},
        {"model": "M", "data": {"eval": {"dev": "d"}}, "checkpoint": {"every": "0.5 epoch"}},
    ],
)
def test_json_schema_takes_what_the_reader_takes(recipe: dict[str, object]) -> None:
    schema = recipe_schema()
    assert accepts(schema, recipe, schema)
    read_recipe(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        {"model": "M", "optm": 3},
        {"model": "M", "optim": {"lrr": 3}},
        {"model": "M", "adapter": "lorra"},
        {"model": "M", "data": {"train": [3]}},
        {"model": "M", "checkpoint": {"every": "3 days"}},
        {"data": "a.jsonl"},
    ],
)
def test_json_schema_refuses_what_the_reader_refuses(recipe: dict[str, object]) -> None:
    schema = recipe_schema()
    assert not accepts(schema, recipe, schema)
    with pytest.raises(RecipeError):
        read_recipe(recipe)


def test_starter_is_valid_once_model_and_data_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(starter_recipe(model="M", data=["a.jsonl"]), encoding="utf-8")
    assert read_recipe(path) == read_recipe({"model": "M", "data": "a.jsonl"})
    path.write_text(starter_recipe(), encoding="utf-8")
    with pytest.raises(RecipeError, match="needed"):
        read_recipe(path)
    assert read_recipe(path, ["model=M", "data=a.jsonl"]).data.train[0].path == "a.jsonl"


def test_starter_shows_every_key_with_its_default() -> None:
    text = starter_recipe(model="M", data=["a.jsonl"])
    lines = [line.removeprefix("  # ") for line in text.splitlines() if line.startswith("  # ")]
    seen = {line.split(":")[0] for line in lines} | {"name", "train"}
    assert {key for keys in known_keys().values() for key in keys} <= seen
    # Taken in all at once they are a recipe again; adapter options need an adapter.
    opened = "\n".join(
        f"  {line[4:]}" if line.startswith("  # ") else line for line in text.splitlines()
    )
    values = yaml.safe_load(opened)
    values["adapter"]["kind"] = "lora"
    expected = read_recipe({"model": "M", "data": "a.jsonl", "adapter": "lora"})
    assert read_recipe(values) == expected
