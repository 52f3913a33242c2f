"""Checks of the model's own files: context length, stop tokens, special tokens."""

from __future__ import annotations

from collections import Counter

from tunesmith.data.formats.examples import Chat
from tunesmith.data.templates.date_check import check_dates
from tunesmith.doctor.corpus import ASSISTANT, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Level, Outcome
from tunesmith.errors import DataError


def template_differs(corpus: Corpus, setup: Setup) -> Outcome:
    """A chat template that is not the model's own, or none where the model has one."""
    jinja, template = setup.model_jinja, setup.template
    hits: list[Hit] = []
    if jinja is not None and not template.has_chat_template:
        hits.append(Hit("data.template", "none, but the model has a chat template"))
    elif (
        jinja is not None and template.jinja is not None and template.jinja.strip() != jinja.strip()
    ):
        hits.append(Hit(template.name, "is not the chat template in the model's folder"))
    hint = (
        "the model must forget its own turns first; leave data.template out, unless it is a base "
        "model. Whoever runs the result needs the template that it is trained with"
    )
    return Outcome(hits, 1, "template", "warning", hint)


def template_dates(corpus: Corpus, setup: Setup) -> Outcome:
    """A chat template that writes today's date: what is learned depends on the day."""
    hits, hint = list[Hit](), None
    try:
        check_dates(setup.template)
    except DataError as error:
        hits, hint = [Hit(setup.template.name, error.message)], error.hint
    return Outcome(hits, 1, "template", "error", hint or "")


def generation_stops(corpus: Corpus, setup: Setup) -> Outcome:
    """A learned stop token that the model's own generation settings don't end at."""
    ends: Counter[int] = Counter()
    for case in corpus.train:
        for segment in case.whole.segments if case.whole is not None else ():
            if len(segment.index):
                ends[int(segment.ids[segment.index[-1]])] += 1
    learned = {token for token in ends if token in setup.template.stop_ids}
    named = setup.stops_named
    hits = [
        Hit(
            "generation_config.json",
            f"does not end at {setup.template.token_text(token)} (id {token})",
        )
        for token in sorted(learned)
        if named is not None and token not in named
    ]
    hint = (
        "the result of a run gets it; elsewhere, and for the model as it is, add the id to "
        "eos_token_id, or generation runs on after each answer"
    )
    return Outcome(hits, 1, "model", "warning", hint)


def pad_is_stop(corpus: Corpus, setup: Setup) -> Outcome:
    """A pad token that is also the stop token: trainers that ignore pads never learn to stop."""
    pad = setup.template.tokenizer.pad_token_id
    hits: list[Hit] = []
    if pad is not None and pad in setup.template.stop_ids:
        hits.append(Hit("tokenizer", f"pad and stop are both {setup.template.token_text(pad)}"))
    hint = "nothing to mend here: nothing is padded and stops are learned; other trainers mask it"
    return Outcome(hits, 1, "tokenizer", "info", hint)


def no_template(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats without a chat template to render them."""
    hits = [
        Hit(str(case.origin), case.fault.message)
        for case in corpus.cases
        if case.fault is not None and case.fault.kind == "no-chat-template"
    ]
    level: Level = "error"
    hint = "data.template=FILE.jinja gives one; string prompt and completion need none"
    return Outcome(hits, len(corpus.cases), "rows", level, hint)


def kwargs_differ(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows that bring arguments of their own for the template."""
    hits = [
        Hit(str(case.origin), f"chat_template_kwargs {dict(case.example.template_kwargs)}")
        for case in corpus.train
        if isinstance(case.example, Chat)
        and case.example.template_kwargs
        and any(m.role == ASSISTANT for m in case.messages)
    ]
    hint = "in use the model answers as learned only under the same arguments"
    return Outcome(hits, len(corpus.train), "rows", "info", hint)
