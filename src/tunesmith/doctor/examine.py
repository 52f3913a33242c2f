"""Builds the corpus of the checks from a recipe: reads rows and tokenizer, never weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.build.sampler import make_sampler, pack_prepared
from tunesmith.build.sources import choose_held_out, make_sources
from tunesmith.config.schema import Holdout, Recipe
from tunesmith.data.formats.detect import detect_format, to_example
from tunesmith.data.formats.examples import Example
from tunesmith.data.preprocess.document_store import source_numbers, token_counts
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.preprocess.prepare import Prepared, PreparedRow, iter_prepared
from tunesmith.data.rendering.render import render_example
from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.sampling.sampler import BatchSampler
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import load_template
from tunesmith.data.templates.template import Template
from tunesmith.doctor.catalogue import run_checks
from tunesmith.doctor.corpus import Case, Corpus, Setup
from tunesmith.doctor.outcome import Finding
from tunesmith.doctor.summary import summarize
from tunesmith.errors import ModelError
from tunesmith.model.source import resolve_model
from tunesmith.types import Document


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The summary of the data and what each check found."""

    summary: dict[str, Any]
    findings: list[Finding]


def diagnose(
    recipe: Recipe,
    template: Template,
    *,
    folders: Sequence[Path] = (),
    rows: int | None = None,
) -> Diagnosis:
    """Examine the recipe's data under its template; `rows` of each source at most.

    Raises:
        InputError: the recipe's data or model can't be read at all.
    """
    corpus = read_corpus(recipe, template, folders=folders, rows=rows)
    order, documents = plan_order(recipe, corpus)
    setup = read_setup(recipe, template, order)
    summary = summarize(corpus, setup, order, documents)
    return Diagnosis(summary, run_checks(corpus, setup))


def read_corpus(
    recipe: Recipe,
    template: Template,
    *,
    folders: Sequence[Path] = (),
    rows: int | None = None,
) -> Corpus:
    """The recipe's rows, and its held-out ones by the name of their set.

    Raises:
        DataError: a source can't be read at all.
    """
    data = recipe.data
    train = _limited(make_sources(data.train, data, folders=folders), rows)
    cases = list(read_cases(train, template, recipe))
    held_out: dict[str, list[Case]] = {}
    if isinstance(data.eval, Holdout):
        choice = choose_held_out(train, data.eval)
        held_out["eval"] = [case for case, values in cases if values and choice.holds(values)]
        cases = [(case, values) for case, values in cases if not (values and choice.holds(values))]
    for name, sections in (data.eval if isinstance(data.eval, dict) else {}).items():
        sources = _limited(make_sources(sections, data, folders=folders), rows)
        held_out[name] = [case for case, _ in read_cases(sources, template, recipe)]
    return Corpus([case for case, _ in cases], held_out)


def read_cases(
    sources: Sequence[Source], template: Template, recipe: Recipe
) -> Iterator[tuple[Case, Mapping[str, Any] | None]]:
    """Every row as a case, with its values; rendered without a limit, then within the recipe's."""
    data = recipe.data
    limit = template.context_length if data.max_length == "auto" else data.max_length
    given = {source.name: source for source in sources}
    for row in iter_prepared(sources, template, train_on=data.train_on, max_length=None):
        source = given[row.origin.source]
        example = _example(row, source.format, template)
        if isinstance(row.result, Fault) or row.result is None:
            case = Case(
                row.origin,
                example,
                fault=row.result,
                section=source.section,
                fields=row.all_fields,
            )
            yield case, row.values
            continue
        document = row.result.document
        length = document.longest_path if document is not None else row.result.tokens
        case = Case(
            row.origin,
            example,
            document,
            row.result,
            length=length,
            section=source.section,
            fields=row.all_fields,
        )
        if document is not None and limit is not None and length > limit and example is not None:
            case = _within(case, example, template, recipe, limit)
        yield case, row.values


def _within(case: Case, example: Example, template: Template, recipe: Recipe, limit: int) -> Case:
    """The case of an over-long row, as the recipe's policy leaves it."""
    try:
        kept = render_example(
            example,
            template,
            train_on=recipe.data.train_on,
            max_length=limit,
            too_long=recipe.data.too_long,
            origin=case.origin,
        )
    except RowError:
        kept = None  # the policy is to refuse it; `over_long` says so
    return replace(case, rendered=kept, over_long=True)


def plan_order(recipe: Recipe, corpus: Corpus) -> tuple[BatchSampler | None, Sequence[Document]]:
    """The order of the steps over what is trained on, None where nothing is, and the documents
    (with `batch.packing` pieces of them) that it numbers.

    Raises:
        DataError: the sources can't be mixed or packed as asked.
    """
    ledger = Ledger()
    documents: list[Document] = []
    section_of: dict[str, int] = {}
    for case in corpus.train:
        if case.rendered is None or case.rendered.document is None:
            continue
        document = case.rendered.document
        documents.append(document)
        section_of[document.origin.source] = case.section
        tokens, targets = document.tokens, document.target_tokens
        ledger.add_trained(
            document.origin, tokens=tokens, targets=targets, context=tokens - targets
        )
    if not documents:
        return None, documents
    prepared = Prepared(documents, ledger, {}, "", [])
    pack_prepared(recipe, prepared)
    names, numbers = source_numbers(prepared.documents)
    order = make_sampler(
        recipe,
        recipe.data.train,
        lengths=token_counts(prepared.documents),
        sections=np.array([section_of[name] for name in names], np.int32)[numbers],
        documents=prepared.documents,
    )
    return order, prepared.documents


def _example(row: PreparedRow, format: str, template: Template) -> Example | None:
    if row.values is None:
        return None
    chosen = detect_format(row.values) if format == "auto" else format
    try:
        return (
            to_example(row.values, format=chosen, templated=template.has_chat_template)
            if chosen
            else None
        )
    except RowError:
        return None


def _limited(sources: Sequence[Source], rows: int | None) -> list[Source]:
    if rows is None:
        return list(sources)
    return [replace(source, limit=min(rows, source.limit or rows)) for source in sources]


def model_folder(recipe: Recipe) -> Path:
    """Where the model's config is. A folder that says what it is needs no weights here."""
    folder = Path(recipe.model.name).expanduser()
    adapter = (folder / "adapter_config.json").is_file()
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    if not adapter and any((folder / name).is_file() for name in names):
        return folder
    return resolve_model(recipe.model.name, revision=recipe.model.revision, weights=False).folder


def read_setup(recipe: Recipe, template: Template, sampler: BatchSampler | None) -> Setup:
    """What the recipe and its model's files say, as far as checks ask.

    Raises:
        ModelError: a file of the model can't be read.
    """
    folder = model_folder(recipe)
    data = recipe.data
    model_template = template
    if data.template is not None:
        trust = recipe.model.trust_remote_code
        model_template = load_template(folder, trust_remote_code=trust, dated=True)
    config = _object(folder / "config.json")
    inner = config.get("text_config") or config
    size = inner.get("vocab_size") or config.get("vocab_size")
    steps = None
    if sampler is not None:
        steps = recipe.train.steps or sampler.total_steps(recipe.train.epochs or 3)
    return Setup(
        template=template,
        max_length=template.context_length if data.max_length == "auto" else data.max_length,
        too_long=data.too_long,
        bad_rows=data.bad_rows,
        vocabulary=_with_added(size, template) if isinstance(size, int) else None,
        stops_named=_stops(_object(folder / "generation_config.json"), config),
        model_jinja=model_template.jinja if model_template.has_chat_template else None,
        total_steps=steps,
    )


def _with_added(size: int, template: Template) -> int:
    """Embeddings of the model once it has those of the tokens its template adds."""
    return max([size, *(token.id + 1 for token in template.added)])


def _stops(generation: Mapping[str, Any], config: Mapping[str, Any]) -> frozenset[int] | None:
    """The ids at which generation ends; None if neither file is there."""
    inner = config.get("text_config") or {}
    for found in (generation, config, inner):
        eos = found.get("eos_token_id")
        if eos is not None:
            return frozenset(eos if isinstance(eos, list) else [eos])
    return frozenset() if generation or config else None


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"can't be read: {error}", where=str(path)) from error
    return found if isinstance(found, dict) else {}
