"""`tunesmith generate`: batched generation of answers to the prompts of files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli.session import (
    DataOption,
    Limit,
    MaxNewTokens,
    ModelArgument,
    Overrides,
    Seed,
    Session,
    SpecialAsText,
    Temperature,
    TopP,
    open_session,
    print_status,
    read_settings,
    sources_of,
)
from tunesmith.errors import DataError, InputError

if TYPE_CHECKING:
    from tunesmith.data.formats.examples import Example
    from tunesmith.data.sources.sources import Row
    from tunesmith.generate import Prompt
    from tunesmith.types import Origin

ROWS_AT_A_TIME = 64
SHOWN = 3
QUOTED = "special-token-in-content"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row of the data and its prompt."""

    origin: Origin
    prompt: Prompt


def generate(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="JSON Lines file for the answers.")],
    overrides: Overrides = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    limit: Limit = None,
    special_as_text: SpecialAsText = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file if it exists.")
    ] = False,
) -> None:
    from tunesmith.generate import Options

    options = Options(max_new_tokens, temperature, top_p, seed)
    recipe = read_settings(model, data=data, overrides=overrides or (), limit=limit)
    _refuse_existing(out, overwrite)
    session = open_session(recipe)
    rows = read_prompts(session, special_as_text=special_as_text)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8") as file:
            ended = 0
            for done, record in enumerate(_records(session, rows, options), start=1):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                ended += record["stopped"]
                if done % ROWS_AT_A_TIME == 0 or done == len(rows):
                    file.flush()
                    print_status(f"answered {done} of {len(rows)} rows")
    except OSError as error:
        raise InputError(f"can't be written: {error.strerror or error}", where=str(out)) from error
    print_status(f"{ended} of {len(rows)} answers ended with a stop token; wrote {out}")


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if out.is_dir():
        raise InputError("is a folder, not a file", where=str(out), hint="give a file as --out")
    if out.exists() and not overwrite:
        raise InputError("the file exists already", where=str(out), hint="--overwrite replaces it")


def _records(session: Session, rows: Sequence[PromptRow], options: Any) -> Iterator[dict[str, Any]]:
    """One record for each row, in the order of the data, ROWS_AT_A_TIME rows at a time."""
    from tunesmith.generate import answers

    for start, group in _groups(rows):
        prompts = [item.prompt.ids for item in group]
        found = dict(answers(session.model, session.template, prompts, options, first_row=start))
        for number, item in enumerate(group):
            record: dict[str, Any] = {
                "source": item.origin.source,
                "row": item.origin.row,
                "prompt": item.prompt.text,
                "generated": found[number].text,
                "stopped": found[number].stopped,
            }
            if item.prompt.reference is not None:
                record["reference"] = item.prompt.reference
            yield record


def _groups(rows: Iterable[PromptRow]) -> Iterator[tuple[int, list[PromptRow]]]:
    items, start = iter(rows), 0
    while group := list(islice(items, ROWS_AT_A_TIME)):
        yield start, group
        start += len(group)


def read_prompts(session: Session, *, special_as_text: bool = False) -> list[PromptRow]:
    """The prompts of all rows.

    Raises:
        DataError: there are rows without a prompt, and the settings do not drop bad rows.
    """
    from tunesmith.data.row_errors import RowError
    from tunesmith.data.sources.sources import read_rows
    from tunesmith.generate import prompt_from

    rows: list[PromptRow] = []
    bad: list[str] = []
    kinds: set[str] = set()
    for source in sources_of(session.recipe):
        for row in read_rows(source):
            try:
                example = _example(session, row, source.format)
                prompt = prompt_from(example, session.template, special_as_text=special_as_text)
                rows.append(PromptRow(row.origin, prompt))
            except RowError as error:
                bad.append(f"{row.origin}: {error.fault.message}")
                kinds.add(error.fault.kind)
    if bad:
        shown = "\n  ".join(bad[:SHOWN])
        message = f"{len(bad)} rows have no prompt:\n  {shown}"
        if session.recipe.data.bad_rows == "error" or not rows:
            hint = "data.bad_rows=drop leaves them out"
            if QUOTED in kinds:
                hint += "; --special-as-text encodes special tokens in a message as plain text"
            raise DataError(message, hint=hint)
        print_status(message)
    return rows


def _example(session: Session, row: Row, format: str) -> Example:
    from tunesmith.data.formats.detect import detect_format, to_example
    from tunesmith.data.row_errors import Fault, RowError

    if row.values is None:
        raise RowError(row.fault or Fault("invalid-row", "the row can't be read"))
    values = dict(row.values)
    if values.get("prompt") is not None and not values.get("completion") and format != "text":
        return _unanswered(session, values)
    found = detect_format(values) if format == "auto" else format
    if found is None:
        raise RowError(Fault("unknown-format", f"no prompt among the columns {', '.join(values)}"))
    return to_example(values, format=found, templated=not session.raw)


def _unanswered(session: Session, values: dict[str, Any]) -> Example:
    """The example of a row that has a prompt and no completion."""
    from tunesmith.data.formats.detect import to_example
    from tunesmith.data.formats.examples import Text

    prompt = values["prompt"]
    if isinstance(prompt, str) and session.raw:
        return Text(prompt)
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return to_example({**values, "messages": turns}, format="messages")
