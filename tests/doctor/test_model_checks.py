"""Checks of the model's files, and of all rows together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from planted import CONTEXT, TEMPLATE, Writer, clean_rows

from tiny import tiny_tokenizer
from tunesmith.config.read import read_recipe
from tunesmith.data.row_errors import Fault
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.doctor.catalogue import run_check, worst
from tunesmith.doctor.corpus import Case, Corpus, Setup
from tunesmith.doctor.examine import read_cases
from tunesmith.types import Origin

SPECIAL = dict(bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


def template_of(jinja: str | None = TEMPLATE, **special: str) -> Template:
    extra = ("<s>", "<unk>", "<pad>")
    tokenizer = tiny_tokenizer(jinja, extra_special=extra, **{**SPECIAL, **special})
    tokenizer.model_max_length = CONTEXT
    return wrap_tokenizer(tokenizer, dated=True)


def corpus_of(rows: Sequence[dict], template: Template, **data: object) -> Corpus:
    recipe = read_recipe({"model": "M", "data": {"train": "none.jsonl", **data}})
    source = Source("rows", rows=list(rows))
    return Corpus([case for case, _ in read_cases([source], template, recipe)])


@pytest.fixture(scope="module")
def clean() -> Corpus:
    return corpus_of(clean_rows(60, 5), template_of())


def level(check: str, corpus: Corpus, setup: Setup) -> str:
    return run_check(check, corpus, setup).level


def test_chats_without_a_template() -> None:
    template = template_of(None)
    corpus = corpus_of(clean_rows(5, 1), template)
    found = run_check("no-chat-template", corpus, Setup(template))
    assert (found.level, found.count, found.of) == ("error", 5, 5)


def test_ids_without_an_embedding(clean: Corpus) -> None:
    setup = Setup(template_of())
    assert level("outside-vocabulary", clean, replace(setup, vocabulary=448)) == "ok"
    found = run_check("outside-vocabulary", clean, replace(setup, vocabulary=300))
    assert found.level == "error"
    assert found.count > 50


def test_pad_that_is_the_stop_token(clean: Corpus) -> None:
    assert level("pad-is-stop", clean, Setup(template_of())) == "ok"
    found = run_check("pad-is-stop", clean, Setup(template_of(pad_token="<|im_end|>")))
    assert found.level == "info"
    assert "<|im_end|>" in found.examples[0].text


def test_generation_that_would_not_stop(clean: Corpus) -> None:
    setup = Setup(template_of(), stops_named=frozenset({2}))
    assert level("generation-stops", clean, setup) == "ok"
    found = run_check("generation-stops", clean, replace(setup, stops_named=frozenset({0})))
    assert found.level == "warning"
    assert "<|im_end|> (id 2)" in found.examples[0].text
    assert level("generation-stops", clean, replace(setup, stops_named=None)) == "ok"


def test_template_that_is_not_the_models_own(clean: Corpus) -> None:
    setup = Setup(template_of(), model_jinja=TEMPLATE)
    assert level("template-differs", clean, setup) == "ok"
    assert level("template-differs", clean, replace(setup, model_jinja=TEMPLATE + "!")) == "warning"
    assert level("template-differs", clean, replace(setup, model_jinja=None)) == "ok"
    raw = replace(setup, template=template_of(None))
    assert level("template-differs", clean, raw) == "warning"


def test_template_that_writes_the_date(clean: Corpus) -> None:
    today = "{{ strftime_now('%d %b %Y') }}"
    fixed = "{{ '26 Jul 2024' }}"
    assert level("template-date", clean, Setup(template_of(today + TEMPLATE))) == "error"
    assert level("template-date", clean, Setup(template_of(fixed + TEMPLATE))) == "ok"


def test_bos_that_the_tokenizer_writes_and_the_template_does_not(clean: Corpus) -> None:
    from tokenizers.processors import TemplateProcessing

    template = template_of()
    backend = template.tokenizer.backend_tokenizer
    assert level("bos", clean, Setup(template)) == "ok"
    pair = ("<s>", template.bos_id)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[pair])
    found = run_check("bos", clean, Setup(template))
    assert (found.level, found.count) == ("error", 60)


def test_one_opening_for_most_answers() -> None:
    writer = Writer(2)
    rows = clean_rows(20, 2)
    rows += [writer.row(answer=f"Sure! Here is the answer: {writer.text()}") for _ in range(40)]
    template = template_of()
    found = run_check("common-opening", corpus_of(rows, template), Setup(template))
    assert (found.level, found.count) == ("info", 40)


@pytest.mark.parametrize(
    ("rows", "steps", "expected"),
    [(60, 100, "ok"), (60, 10, "info"), (10, 100, "warning"), (0, None, "error")],
)
def test_very_little_data(rows: int, steps: int | None, expected: str) -> None:
    template = template_of()
    setup = Setup(template, total_steps=steps)
    corpus = corpus_of(clean_rows(rows, 1) if rows else [{"messages": []}], template)
    assert level("small-data", corpus, setup) == expected


def test_rows_beyond_the_models_context() -> None:
    template = template_of()
    rows = [*clean_rows(5, 1), Writer(1).row(Writer(2).words(1200))]
    found = run_check("over-context", corpus_of(rows, template, max_length=9000), Setup(template))
    assert (found.level, found.count, found.examples[0].where) == ("error", 1, "rows:5")
    fine = corpus_of(rows, template)
    assert level("over-context", fine, Setup(template)) == "ok"
    assert level("too-long", fine, Setup(template, max_length=512)) == "error"


@pytest.mark.parametrize(
    ("policy", "expected", "text"),
    [
        ("error", "error", "would stop"),
        ("drop", "warning", "left out"),
        ("truncate", "warning", "targets are lost"),
    ],
)
def test_truncated_answers_cost_what_the_policy_says(policy: str, expected: str, text: str) -> None:
    writer = Writer(3)
    contents = [writer.words(60) for _ in range(6)]
    template = template_of()
    corpus = corpus_of(
        [{"messages": writer.turns(*contents)}], template, max_length=512, too_long=policy
    )
    found = run_check("too-long", corpus, Setup(template, max_length=512, too_long=policy))
    assert found.level == expected
    assert text in found.examples[0].text


def test_a_fault_that_no_check_knows_is_shown() -> None:
    template = template_of()
    case = Case(Origin("f", 3), None, fault=Fault("new-kind", "it is odd"))
    found = run_check("other-faults", Corpus([case]), Setup(template))
    assert found.examples[0].where == "f:3"
    assert found.examples[0].text == "new-kind: it is odd"
    assert worst([found]) == "error"
    assert level("other-faults", Corpus([case]), Setup(template, bad_rows="drop")) == "warning"
