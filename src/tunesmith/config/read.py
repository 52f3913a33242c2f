"""Read a recipe from a file, a mapping or keywords; all errors are reported at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tunesmith.config.checks import check_combinations
from tunesmith.config.document import Document, Problem, plain_document, read_document
from tunesmith.config.dump import to_plain
from tunesmith.config.overrides import Override, apply_overrides
from tunesmith.config.problems import note_findings
from tunesmith.config.renamed import complain_of_old_names, translated
from tunesmith.config.schema import Recipe
from tunesmith.errors import RecipeError
from tunesmith.redact import secret_keys

RecipeSource = str | PathLike[str] | Mapping[str, Any] | Recipe | None
_SCHEMA = "`tunesmith schema` prints every key with what it may be"


def read_recipe(
    source: RecipeSource = None,
    overrides: Sequence[str | Override] = (),
    *,
    held_out_rows: bool = False,
    of_run: bool = False,
    **sections: Any,
) -> Recipe:
    """The recipe of a file, a run folder, a mapping or a Recipe, changed by overrides.

    `overrides` are `section.key=value`, applied in order; `sections` come after them, as in
    `optim={"lr": 1e-4}` or `adapter="lora"`. `held_out_rows` says that evaluation rows are given
    apart from the recipe. `of_run` says that a mapping was written by a run, perhaps by an older
    version: its old names are translated. A recipe.yaml beside a machine.json is known as a run's.

    Raises:
        RecipeError: with everything that is wrong, each with its file and line, key and hint.
    """
    document = _open(source, of_run=of_run)
    keywords = [
        Override((name,), value, f"{name}=")
        for name, value in sections.items()
        if value is not None
    ]
    apply_overrides(document, [*overrides, *keywords])
    complain_of_old_names(document)
    check_combinations(document, held_out=held_out_rows)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(document.data)
    except ValidationError as error:
        note_findings(document, error)
    if recipe is None or document.problems:
        raise recipe_error(document.problems)
    _refuse_secrets(recipe)
    return recipe


def _refuse_secrets(recipe: Recipe) -> None:
    """A recipe is kept, shown and passed on; what it must not tell stays out of it."""
    for key in secret_keys(to_plain(recipe)):
        raise RecipeError(
            "holds a password or an access token, which a recipe must not",
            where=key,
            hint="put it into the environment (HF_TOKEN, WANDB_API_KEY, ...), or log in: hf auth "
            "login",
        )


def recipe_error(problems: Sequence[Problem]) -> RecipeError:
    """One error that tells all problems, in the order of the recipe's lines."""
    ordered = sorted(dict.fromkeys(problems), key=_order)
    if len(ordered) == 1:
        only = ordered[0]
        where = " ".join(part for part in (only.where, only.key) if part)
        return RecipeError(only.message, where=where or None, hint=only.hint or _SCHEMA)
    lines = [f"{item}{f' ({item.hint})' if item.hint else ''}" for item in ordered]
    message = "\n  ".join([f"{len(ordered)} errors in the recipe", *lines])
    return RecipeError(message, where=None, hint=_SCHEMA)


def _order(problem: Problem) -> tuple[bool, str, int]:
    name, _, line = problem.where.rpartition(":")
    if not line.isdigit():
        return True, problem.where, 0
    return False, name, int(line)


def _open(source: RecipeSource, *, of_run: bool) -> Document:
    if source is None:
        return Document({})
    if isinstance(source, Recipe):
        return plain_document(to_plain(source), "")
    if isinstance(source, Mapping):
        return plain_document(translated(source) if of_run else source, "")
    path = Path(source)
    try:
        if path.is_dir() and (path / "recipe.yaml").is_file():
            path = path / "recipe.yaml"
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(
            "no such recipe", where=str(path), hint="`tunesmith init` writes a starter recipe"
        ) from None
    except IsADirectoryError:
        raise RecipeError(
            "a folder without recipe.yaml is no recipe",
            where=str(path),
            hint="give a recipe file, or the folder of a run",
        ) from None
    except (OSError, ValueError) as error:  # a ValueError: not UTF-8, or no name of a file
        hint = "a recipe is YAML in UTF-8 that you may read"
        raise RecipeError(f"can't be read: {error}", where=str(path), hint=hint) from None
    document = read_document(text, str(path))
    if document.problems and not document.data:
        raise recipe_error(document.problems)
    if path.name == "recipe.yaml" and path.with_name("machine.json").is_file():
        document.data = translated(document.data)
    return document
