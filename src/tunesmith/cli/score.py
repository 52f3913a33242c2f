"""`tunesmith score`: loss, difficulty (IFD) and token statistics of each row, as a Parquet file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.eval import MICRO_TOKENS
from tunesmith.cli.inputs import (
    Arguments,
    DataOption,
    ModelOption,
    recipe_from_arguments,
    split_arguments,
)
from tunesmith.cli.session import Limit, Session, open_session, print_status, read_settings
from tunesmith.display import put
from tunesmith.errors import InputError, RecipeError

if TYPE_CHECKING:
    from tunesmith.config.schema import Recipe
    from tunesmith.data.preprocess.prepare import Prepared
    from tunesmith.data.sources.sources import Source
    from tunesmith.scoring.table import ScoredSource

SECONDS = 10
"""Seconds between two status lines."""


def score(
    out: Annotated[Path, typer.Option("--out", help="The Parquet file to write.")],
    arguments: Arguments = None,
    model: ModelOption = None,
    data: DataOption = None,
    limit: Limit = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object.")
    ] = False,
) -> None:
    """Compute loss, difficulty and token statistics of each row, and write a Parquet file."""
    from tunesmith.scoring.rows import score_rows, summary
    from tunesmith.scoring.table import write_scores

    check_output(out, overwrite=overwrite)
    recipe, folders = _settings(arguments or (), model, data or (), limit)
    session = open_session(recipe)
    sources = _sources(recipe, folders)
    prepared = _prepare(session, sources)
    scores = score_rows(
        prepared,
        session.model,
        session.template,
        micro_tokens=_micro_tokens(session, prepared),
        device=session.device,
        everything=recipe.data.train_on == "all",
        on_scored=_counter(len(prepared.documents)),
    )
    write_scores(out, scores, sources=_scored(sources, prepared), about=_about(session))
    found = {"out": str(out), **summary(scores)}
    if as_json:
        put(json.dumps(found, ensure_ascii=False))
    else:
        _print_table(found)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check that an output file can be written.

    Raises:
        InputError: its folder does not exist, it is a folder, or it exists and is not to be
            overwritten.
    """
    if not path.parent.is_dir():
        raise InputError("there is no such folder", where=str(path.parent))
    if path.is_dir():
        raise InputError("is a folder, not a file", where=str(path), hint="give a file in it")
    if path.exists() and not overwrite:
        raise InputError("the file exists already", where=str(path), hint="--overwrite replaces it")


def _settings(
    arguments: Sequence[str], model: str | None, data: Sequence[str], limit: int | None
) -> tuple[Recipe, list[Path]]:
    """The recipe, and the folders in which its files are looked for.

    Without a recipe, a run that is given as --model brings its columns and settings.
    """
    source, overrides = split_arguments(arguments)
    if source is not None:
        recipe = recipe_from_arguments(arguments, model, data)
        path = Path(source).expanduser()
        return _limited(recipe, limit), [path if path.is_dir() else path.parent]
    if model is None or not data:
        what = "no model" if model is None else "no data"
        raise RecipeError(f"{what} to score with", hint="give RECIPE, or --model M --data FILE")
    return read_settings(model, data=data, overrides=overrides, limit=limit), []


def _limited(recipe: Recipe, limit: int | None) -> Recipe:
    if limit is None:
        return recipe
    train = [source.model_copy(update={"limit": limit}) for source in recipe.data.train]
    data = recipe.data.model_copy(update={"train": train})
    return recipe.model_copy(update={"data": data})


def _sources(recipe: Recipe, folders: Sequence[Path]) -> list[Source]:
    from tunesmith.build.sources import make_sources

    return make_sources(recipe.data.train, recipe.data, folders=folders)


def _prepare(session: Session, sources: Sequence[Source]) -> Prepared:
    from tunesmith.build.data import resolve_max_length
    from tunesmith.data.preprocess.prepare import prepare

    section = session.recipe.data
    return prepare(
        sources,
        session.template,
        train_on=section.train_on,
        max_length=resolve_max_length(session.recipe, session.template),
        too_long=section.too_long,
        bad_rows=section.bad_rows,
    )


def _micro_tokens(session: Session, prepared: Prepared) -> int:
    """Tokens of a micro-batch. The model passes its self-test first, as before a run."""
    from tunesmith.model.selftest import self_test

    longest = max(document.longest_path for document in prepared.documents)
    for note in self_test(session.model, max_length=longest).notes:
        print_status(note)
    micro_tokens = session.recipe.device.micro_tokens
    return MICRO_TOKENS if micro_tokens == "auto" else micro_tokens


def _scored(sources: Sequence[Source], prepared: Prepared) -> dict[str, ScoredSource]:
    from tunesmith.scoring.table import ScoredSource

    return {
        source.name: ScoredSource(
            sha256=prepared.content_hashes[source.name],
            rows=prepared.ledger.sources[source.name].rows,
            format=prepared.formats.get(source.name),
            columns=dict(source.columns) if source.columns else None,
        )
        for source in sources
    }


def _about(session: Session) -> dict[str, Any]:
    from tunesmith.version import __version__

    recipe, template = session.recipe, session.template
    return {
        "tunesmith": __version__,
        "model": recipe.model.name,
        "revision": recipe.model.revision,
        "dtype": str(next(session.model.parameters()).dtype).removeprefix("torch."),
        "template": {
            "name": template.name,
            "sha256": template.sha256,
            "kwargs": dict(template.kwargs),
        },
        "train_on": recipe.data.train_on,
    }


def _counter(total: int) -> Callable[[int], None]:
    """A callback that counts scored rows and prints the count every SECONDS."""
    done, printed_at = 0, time.monotonic()

    def note(rows: int) -> None:
        nonlocal done, printed_at
        done += rows
        if time.monotonic() - printed_at >= SECONDS:
            printed_at = time.monotonic()
            print_status(f"scored {done:,} of {total:,} rows")

    return note


_LABELS = {
    "rows": ("rows", "{:,}"),
    "scored": ("scored", "{:,}"),
    "without_ifd": ("scored without IFD", "{:,}"),
    "target_tokens": ("target tokens", "{:,}"),
    "median_loss": ("median loss (nats per target)", "{:.4f}"),
    "median_accuracy": ("median token accuracy", "{:.2%}"),
    "median_entropy": ("median entropy (nats)", "{:.4f}"),
    "median_loss_alone": ("median loss without prompt", "{:.4f}"),
    "median_ifd": ("median IFD", "{:.4f}"),
    "median_inverse_p_p50": ("median of the rows' median 1/p(target)", "{:.3f}"),
}


def _print_table(found: dict[str, Any]) -> None:
    width = max(len(label) for label, _ in _LABELS.values())
    for name, (label, form) in _LABELS.items():
        value = found[name]
        put(f"{label:<{width}}  {'-' if value is None else form.format(value):>12}")
    put(f"written to {found['out']}")
