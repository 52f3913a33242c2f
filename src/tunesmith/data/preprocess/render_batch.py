"""Batched rendering: the rows of a batch are rendered one by one, their texts are tokenized in one
call.

Rendering a row is a generator that yields the texts it needs as ids. All rows of a batch run up to
their next yield, then one tokenizer call serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from tunesmith.data.fields.table import FORMATS
from tunesmith.data.formats.detect import detect_format, to_example
from tunesmith.data.preprocess.document_store import Columns, pack
from tunesmith.data.rendering.render import Rendered, Rendering, render_steps
from tunesmith.data.rendering.tokenize import Encoder, Wanted
from tunesmith.data.rendering.unread import account
from tunesmith.data.row_errors import Fault, Field, RowError
from tunesmith.data.sources.readers.rows import LongRow
from tunesmith.data.templates.template import Template
from tunesmith.types import IntArray, Origin

ROWS = 128
"""Rows of a full batch: enough that texts repeat, few enough to stay in the CPU's cache."""

T = TypeVar("T")


class Task(NamedTuple):
    """A row to render, with the format of its source."""

    origin: Origin
    values: dict[str, Any]
    format: str | None  # of the source; None if no row so far had a known format
    detect: bool  # the format was detected, so this row may have another one
    fields: tuple[Field, ...] = ()  # what reading it has renamed or taken out
    roles: frozenset[str] = frozenset()  # further names of roles that the recipe knows


@dataclass(frozen=True, slots=True)
class Options:
    """The settings, besides the template, by which a row is rendered."""

    train_on: str | list[str] = "auto"
    max_length: int | None = None
    too_long: str = "error"


def in_batches(items: Iterable[T], size: int = ROWS) -> Iterator[list[T]]:
    """Batches whose size doubles from 1 to `size`, so that the first results come early; a long row
    ends its batch.
    """
    batch: list[T] = []
    limit = 1
    for item in items:
        batch.append(item)
        if len(batch) == limit or isinstance(getattr(item, "values", None), LongRow):
            yield batch
            batch, limit = [], min(2 * limit, size)
    if batch:
        yield batch


def render_batch(
    tasks: Sequence[Task], template: Template, encoder: Encoder, options: Options
) -> list[Rendered | Fault]:
    """The result of each row, equal to that of rendering it alone."""
    results: dict[int, Rendered | Fault] = {}
    waiting: list[tuple[int, Rendering, Sequence[Wanted]]] = []

    def advance(at: int, steps: Rendering, ids: Sequence[IntArray] | None) -> None:
        try:
            wanted = next(steps) if ids is None else steps.send(ids)
        except StopIteration as finished:
            results[at] = finished.value
        except RowError as error:
            results[at] = error.fault
        else:
            if any(_broken(text) for text, _ in wanted):
                steps.close()
                results[at] = _BROKEN
            else:
                retried.append((at, steps, wanted))

    retried = waiting
    for at, task in enumerate(tasks):
        advance(at, _start(task, template, options), None)
    while waiting:
        found = iter(encoder.encode([text for _, _, wanted in waiting for text in wanted]))
        retried = []
        for at, steps, wanted in waiting:
            advance(at, steps, [next(found) for _ in wanted])
        waiting = retried
    return [results[at] for at in range(len(tasks))]


_BROKEN = Fault(
    "broken-text",
    "its text has half of a character that UTF-16 writes as two (a lone surrogate)",
    "write the rows again from a source that is still whole, or leave the row out",
)


def _broken(text: str) -> bool:
    """True for a text that can't be encoded as UTF-8, which no tokenizer accepts."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _start(task: Task, template: Template, options: Options) -> Rendering:
    _require_format(task.values, task.format, detect=task.detect)
    templated = template.has_chat_template
    example = to_example(task.values, format=task.format or "", templated=templated)
    roles = task.roles
    if not isinstance(options.train_on, str):
        roles = roles.union(options.train_on)
    fields = account(task.values, task.format or "", example, template, roles=roles)
    rendered = yield from render_steps(
        example,
        template,
        train_on=options.train_on,
        max_length=options.max_length,
        too_long=options.too_long,
        origin=task.origin,
    )
    return replace(rendered, fields=fields) if fields else rendered


def _require_format(values: Mapping[str, Any], chosen: str | None, *, detect: bool) -> None:
    """Raises RowError unless the row has the format of its source."""
    mine = _format_of(values) if detect else chosen
    if chosen is None or (mine is None and not set(FORMATS[chosen]) & set(values)):
        names = ", ".join(f"`{name}`" for name in values) or "none"
        raise RowError(
            Fault(
                "unknown-format",
                f"the row has the columns of no known format; it has {names}",
                "columns with other names are named in data.columns",
            )
        )
    if mine is not None and mine != chosen:
        raise RowError(
            Fault(
                "mixed-format",
                f"the row holds {_spoken(mine)}, the rows before it {_spoken(chosen)}",
                "rows of one source have one format; give each format a file of its own",
            )
        )


def _format_of(values: Mapping[str, Any]) -> str | None:
    if any(value is None for value in values.values()):
        return detect_format(values)
    return _format_by_columns(tuple(values))


@lru_cache(maxsize=1024)
def _format_by_columns(columns: tuple[str, ...]) -> str | None:
    """The format of rows with a value in each of these columns."""
    return detect_format(dict.fromkeys(columns, True))


def _spoken(format: str) -> str:
    return "+".join(FORMATS[format])


class Outcome(NamedTuple):
    """The outcome of a row in numbers: tokens of the whole row, targets, context, and unused
    tokens.

    `trained`: the row has a document.
    """

    trained: bool
    tokens: int = 0
    targets: int = 0
    context: int = 0
    unused: int = 0
    reason: str | None = None
    fault: Fault | None = None
    fields: tuple[Field, ...] = ()  # those that nothing reads


@dataclass(frozen=True, slots=True)
class Packed:
    """The outcomes of a batch's rows, and the documents of those that have one, in order."""

    outcomes: list[Outcome]
    columns: Columns


def pack_batch(
    tasks: Sequence[Task], template: Template, encoder: Encoder, options: Options
) -> Packed:
    """Render a batch; the result is in the form in which documents are stored and sent between
    processes.
    """
    results = render_batch(tasks, template, encoder, options)
    documents = [
        one.document for one in results if not isinstance(one, Fault) and one.document is not None
    ]
    return Packed([_outcome_of_some(one) for one in results], pack(documents))


def outcome_of(result: Rendered | Fault | None) -> Outcome | None:
    """The outcome of a row in numbers; None for a row that was held out."""
    return None if result is None else _outcome_of_some(result)


def _outcome_of_some(result: Rendered | Fault) -> Outcome:
    if isinstance(result, Fault):
        return Outcome(False, reason=result.kind, fault=result, fields=result.fields)
    document, fields = result.document, result.fields
    if document is None:
        return Outcome(False, result.tokens, reason=result.reason, fields=fields)
    targets = document.target_tokens
    context = document.tokens - targets
    return Outcome(
        True, result.tokens, targets, context, result.unused, result.reason, fields=fields
    )
