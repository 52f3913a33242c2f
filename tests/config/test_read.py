"""Reading recipes: short forms, and every error at once with its line, key and hint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunesmith.config.document import read_document
from tunesmith.config.names import known_keys
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import Recipe
from tunesmith.config.sections.model import AdapterSection
from tunesmith.config.values import Holdout
from tunesmith.errors import RecipeError


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: object, *overrides: str, **sections: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read_recipe(source, overrides, **sections)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    return caught.value


def test_short_forms_stand_for_main_keys(tmp_path: Path) -> None:
    recipe = read_recipe(
        write(tmp_path, "model: M\ndata: train.jsonl\nadapter: lora\nlog: [wandb]\noptim:\n")
    )
    assert recipe.model.name == "M"
    assert [source.path for source in recipe.data.train] == ["train.jsonl"]
    assert recipe.adapter.kind == "lora"
    assert recipe.log.to == ["wandb"]
    assert recipe.optim.lr == "auto"


def test_scientific_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, "model: M\noptim: {lr: 2e-5, betas: [9e-1, 0.95], eps: 1e-6}\n")
    optim = read_recipe(path).optim
    assert (optim.lr, optim.betas, optim.eps) == (2e-5, (0.9, 0.95), 1e-6)


def test_lengths_and_sizes_default_only_where_the_other_is_not_given() -> None:
    plain = read_recipe({"model": "M"})
    assert (plain.train.epochs, plain.train.steps) == (3, None)
    assert (plain.batch.documents, plain.batch.tokens) == (32, None)
    given = read_recipe({"model": "M", "train": {"steps": 10}, "batch": {"tokens": 4096}})
    assert (given.train.epochs, given.train.steps) == (None, 10)
    assert (given.batch.documents, given.batch.tokens) == (None, 4096)


def test_data_sources_may_be_paths_mappings_or_both() -> None:
    recipe = read_recipe(
        {"model": "M", "data": {"train": ["a.jsonl", {"path": Path("b.csv"), "limit": 5}]}}
    )
    assert [(source.path, source.limit) for source in recipe.data.train] == [
        ("a.jsonl", None),
        ("b.csv", 5),
    ]


def test_eval_becomes_a_share_or_named_sets() -> None:
    assert read_recipe({"model": "M", "data": {"eval": "2%"}}).data.eval == Holdout(share=0.02)
    sets = read_recipe({"model": "M", "data": {"eval": {"dev": "d.jsonl"}}}).data.eval
    assert isinstance(sets, dict)
    assert sets["dev"][0].path == "d.jsonl"


def test_all_errors_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: M\n"
        "data:\n"
        "  train: a.jsonl\n"
        "  max_lenght: 10\n"
        "optim:\n"
        "  lr: quick\n"
        "  schedule: cosin\n"
        "  warmup: -1\n"
        "checkpoint: {every: 3 days}\n"
        "train: {epochs: 1, steps: 2}\n",
    )
    text = str(refusal(path))
    assert text.splitlines()[0] == "6 errors in the recipe"
    for line, key, part in [
        (4, "data.max_lenght", "did you mean data.max_length?"),
        (6, "optim.lr", "must be auto or a number, not 'quick'"),
        (7, "optim.schedule", "did you mean cosine?"),
        (8, "optim.warmup", "must be at least 0, not -1"),
        (9, "checkpoint.every", "0.25 epoch"),
        (10, "train", "exclude each other"),
    ]:
        found = [row for row in text.splitlines() if f"recipe.yaml:{line} {key}: " in row]
        assert len(found) == 1, (key, text)
        assert part in found[0]


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("model: M\noptim: {lr: -1}\n", ":2 optim.lr", "above 0"),
        ("model: M\nadapter:\n  kind: lorra\n", ":3 adapter.kind", "lorra"),
        ("model: M\ntrain: {epochs: yes}\n", ":2 train.epochs", "not true"),
        ("model: M\ntrain: {seed: true}\n", ":2 train.seed", "not true"),
        ("model: M\ndevice: {deterministic: 7}\n", ":2 device.deterministic", "true or false"),
        ("model: {name: M, revision: 123}\n", ":1 model.revision", "text"),
        ("model: M\ndata:\n  train:\n  - pth: x\n    path: y\n", ":4 data.train.0.pth", "unknown"),
        ("model: M\ndata: {train: [a, 4]}\n", ":2 data.train.1", "mapping"),
        ("model: M\ndata: {eval: 0.5}\n", ":2 data.eval", "2%"),
        ("model: M\ndata:\n  eval:\n    dev: {path: 3}\n", ":4 data.eval.dev", "text"),
        ("model: M\ndata:\n  max_length: 1\n", ":3 data.max_length", "at least 2"),
        ("model: M\nmodel: N\n", ":2 model", "twice"),
        ("model: M\noptim:\n\tlr: 1\n", ":3", "not YAML"),
        ("model: [M\n", ":2", "not YAML"),
        ("- model\n", "", "mapping of sections"),
        ("model: M\noptim: {lr: !secret 3}\n", ":2 optim.lr", "!secret"),
        ("model: &m {name: *m}\n", ":1 model", "holds itself"),
        ("model: M\ndata: {eval: []}\n", ":2 data.eval", "names no file"),
        ("model: M\ndata: {eval: {a: }}\n", ":2 data.eval", "names no file"),
        ("model: M\ndata: {eval: {}}\n", ":2 data.eval", "names no set"),
        ("model: M\ndata: {train: ''}\n", ":2 data.train.0", "is empty"),
        ("model: M\noptim: {betas: [0.9]}\n", ":2 optim.betas.1", "needed"),
        ("model: M\noptim: {betas: [0.9, 0.9, 0.9]}\n", ":2 optim.betas", "2 items"),
        ("model: M\noptim: {betas: [0.9, 1.5]}\n", ":2 optim.betas.1", "below 1"),
        ("model: M\noptim: {lr: .nan}\n", ":2 optim.lr", "finite"),
        ("model: ''\n", ":1 model", "needed"),
        ("data: a.jsonl\n", "model", "needed"),
        ("model:\n", "model", "needed"),
        ("", "model", "needed"),
    ],
)
def test_each_mistake_is_named_where_it_stands(
    tmp_path: Path, text: str, where: str, message: str
) -> None:
    error = str(refusal(write(tmp_path, text)))
    line = next(line for line in error.splitlines() if message in line)
    assert where in line


def test_errors_in_a_section_given_twice_are_all_seen(tmp_path: Path) -> None:
    error = str(refusal(write(tmp_path, "model: M\noptim: {lr: x}\noptim: {warmup: y}\n")))
    assert ":2 optim.lr" in error
    assert ":3 optim.warmup" in error
    assert ":3 optim: given twice; the first is on line 2" in error


def test_dotted_key_in_a_file_says_how_to_nest_it(tmp_path: Path) -> None:
    assert "`optim: {lr: ...}`" in str(refusal(write(tmp_path, "model: M\noptim.lr: 3\n")))


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    assert "no such recipe" in str(refusal(tmp_path / "nothing.yaml"))
    assert "no recipe" in str(refusal(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"model: \xff\xfe")
    assert "can't be read" in str(refusal(tmp_path / "binary.yaml"))


def test_run_folder_stands_for_its_recipe(tmp_path: Path) -> None:
    write(tmp_path, "model: M\n")
    assert read_recipe(tmp_path).model.name == "M"


def test_best_needs_held_out_data() -> None:
    source = {"model": "M", "train": {"result": "best"}}
    assert "data.eval" in str(refusal(source))
    assert read_recipe(source, held_out_rows=True).train.result == "best"
    assert read_recipe(source, ["data.eval=2%"]).train.result == "best"


def test_adapter_options_without_an_adapter_are_refused() -> None:
    error = refusal({"model": "M", "adapter": {"rank": 8}})
    assert error.where is not None
    assert "adapter.rank" in error.where
    assert error.hint is not None
    assert "adapter.kind=lora" in error.hint
    assert read_recipe({"model": "M", "adapter": {"rank": 8}}, ["adapter=lora"]).adapter.rank == 8


def test_combinations_are_reported_together_with_wrong_values() -> None:
    text = str(refusal({"model": "M", "train": {"result": "best", "seed": -1}}))
    assert "train.result" in text
    assert "train.seed" in text


def test_keywords_change_the_recipe_they_are_given_with() -> None:
    recipe = read_recipe(
        {"model": "M", "optim": {"lr": 1e-3, "warmup": 5}},
        optim={"lr": 1e-4},
        adapter=AdapterSection(kind="lora", rank=4),
        model=Path("other"),
    )
    assert (recipe.optim.lr, recipe.optim.warmup) == (1e-4, 5)
    assert (recipe.adapter.kind, recipe.adapter.rank) == ("lora", 4)
    assert recipe.model.name == "other"
    assert "unknown key" in str(refusal({"model": "M"}, optimizer={"lr": 1}))


def test_a_recipe_object_can_be_read_again_and_changed() -> None:
    first = read_recipe({"model": "M", "data": {"eval": "2%"}, "train": {"epochs": 1}})
    assert read_recipe(first) == first
    assert read_recipe(first, ["train.steps=5"]).train.epochs is None
    assert isinstance(first, Recipe)


def test_merge_keys_and_aliases_are_followed(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: M\n"
        "data:\n"
        "  train:\n"
        "    - &first {path: a.jsonl, limit: 3}\n"
        "    - &second {<<: *first, path: b.jsonl}\n"
        "  eval: {one: *second, two: [*second]}\n",
    )
    recipe = read_recipe(path)
    assert [(source.path, source.limit) for source in recipe.data.train] == [
        ("a.jsonl", 3),
        ("b.jsonl", 3),
    ]
    assert isinstance(recipe.data.eval, dict)
    assert recipe.data.eval["one"] == recipe.data.eval["two"]


def test_merged_mappings_are_replaced_not_joined(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: M\n"
        "data:\n"
        "  train:\n"
        "    - &first {path: a, columns: {prompt: q, completion: r}}\n"
        "    - {<<: *first, columns: {prompt: x}}\n",
    )
    assert read_recipe(path).data.train[1].columns == {"prompt": "x"}


WORDS = st.sampled_from(
    [*known_keys(), *sum(known_keys().values(), ()), "<<", "x", "learning_rate"]
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 300), st.floats(), st.text(max_size=5), WORDS
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=4)),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(WORDS, TREES, max_size=5), st.lists(st.tuples(WORDS, WORDS, TREES), max_size=2)
)
def test_whatever_stands_in_a_recipe_is_read_or_refused(
    data: dict[str, Any], changes: list[tuple[str, str, Any]]
) -> None:
    overrides = [f"{section}.{key}={yaml.safe_dump(value)}" for section, key, value in changes]
    try:
        recipe = read_recipe(data, overrides)
    except RecipeError:
        return
    assert read_recipe(recipe) == recipe


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="model:[]{}&*!|>-#'\"\n\t ,<?%@`1\x00é", max_size=30))
def test_whatever_text_is_read_or_noted(text: str) -> None:
    document = read_document(text, "r.yaml")
    assert isinstance(document.data, dict)


@pytest.mark.parametrize("text", ["<<: x", "[" * 5000, "a: " + "[" * 5000])
def test_yaml_that_is_no_recipe_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        read_recipe(path)
