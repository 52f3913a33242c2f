"""The registry of checks, in the order in which they are printed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from tunesmith.doctor.checks import (
    amount,
    answers,
    duplicates,
    faults,
    model,
    targets,
    text,
    tokens,
    tools,
)
from tunesmith.doctor.corpus import Corpus, Setup
from tunesmith.doctor.outcome import LEVELS, Finding, Level, Outcome

EXAMPLES = 20
"""Hits of a check that are kept; the count is of all."""


class Check(NamedTuple):
    """A check's title, which says what it looks for, and the function that does."""

    title: str
    run: Callable[[Corpus, Setup], Outcome]


_DROP = "mend the rows, or data.bad_rows=drop leaves them out"
_COLUMNS = "data.columns names the right columns; else mend the rows or data.bad_rows=drop"
_SPECIAL = "take it out, or write it so that it is not that token"
_CONTENT = "take it out of the data, or use a template that renders it"
_TARGET = "data.template_kwargs='{enable_thinking: false}', reasoning_content, or another template"

CHECKS: dict[str, Check] = {
    "unreadable-rows": Check("rows that can't be read", faults.of_kinds(faults.READING, _DROP)),
    "wrong-shape": Check("rows of a wrong shape", faults.of_kinds(faults.SHAPE, _COLUMNS)),
    "unread-fields": Check("fields that nothing reads", faults.unread_fields),
    "renamed-fields": Check("fields read under another name", faults.renamed_fields),
    "no-chat-template": Check("chats without a chat template", model.no_template),
    "role-order": Check("turns out of order", faults.role_order),
    "dropped-content": Check(
        "content the template drops", faults.of_kinds(faults.DROPPED, _CONTENT)
    ),
    "special-tokens": Check(
        "control tokens inside content", faults.of_kinds(faults.SPECIAL, _SPECIAL)
    ),
    "no-right-target": Check(
        "prompts their answers don't continue", faults.of_kinds(faults.TARGETS, _TARGET)
    ),
    "other-faults": Check("rows refused for other reasons", faults.other_faults),
    "unsupervised": Check("rows with nothing to learn", targets.unsupervised),
    "barely-supervised": Check("rows with next to nothing to learn", targets.sparse),
    "prompts-trained": Check("chats whose prompts are learned too", targets.prompts_trained),
    "too-long": Check("rows over max_length, answers cut off", targets.truncated),
    "over-context": Check("rows over the model's context", amount.context),
    "unused-turns": Check("turns after the last answer", targets.unanswered),
    "rewritten-history": Check("history the template rewrites", targets.branching),
    "stop-token": Check("stop token missing or not learned", tokens.stop_token),
    "bos": Check("BOS missing or doubled", tokens.beginning),
    "boundary": Check("answers that merge with their prompt", tokens.boundary),
    "unknown-tokens": Check("unknown tokens", tokens.unknown_tokens),
    "outside-vocabulary": Check("ids without an embedding", tokens.outside_vocabulary),
    "pad-is-stop": Check("pad token that is the stop token", model.pad_is_stop),
    "generation-stops": Check("generation that would not stop", model.generation_stops),
    "template-differs": Check("template that is not the model's own", model.template_differs),
    "template-date": Check("template that writes the date", model.template_dates),
    "template-kwargs": Check("rows with template arguments", model.kwargs_differ),
    "empty-answers": Check("answers that are empty or placeholders", answers.empty),
    "cut-off-answers": Check("answers that break off", answers.cut_off),
    "repeated-answers": Check("one answer to many questions", answers.repeated),
    "format-collapse": Check("nearly identical answers", answers.collapse),
    "common-opening": Check("one opening for most answers", answers.opening),
    "prompt-echo": Check("answers that repeat the question", answers.echo),
    "turn-markers": Check("answers with turns inside", answers.markers),
    "loops": Check("answers stuck in a loop", answers.loops),
    "encoding": Check("damaged letters, control characters", text.encoding),
    "html-entities": Check("HTML entities in plain text", text.entities),
    "tool-calls": Check("broken tool calls", tools.calls),
    "tool-results": Check("tool results without their call", tools.results),
    "duplicates": Check("exact duplicates", duplicates.exact),
    "near-duplicates": Check("near duplicates", duplicates.near),
    "several-answers": Check("questions with several answers", duplicates.conflicting),
    "leakage": Check("held-out rows in the training data", duplicates.leaked),
    "near-leakage": Check("held-out rows nearly in the training data", duplicates.nearly_leaked),
    "length-outliers": Check("rows far longer or shorter than others", amount.outliers),
    "small-data": Check("very little data", amount.small),
}


def run_checks(corpus: Corpus, setup: Setup) -> list[Finding]:
    """What every check finds, in the order of CHECKS."""
    return [run_check(name, corpus, setup) for name in CHECKS]


def run_check(name: str, corpus: Corpus, setup: Setup) -> Finding:
    """What the check of this name finds."""
    check = CHECKS[name]
    outcome = check.run(corpus, setup)
    return Finding(
        check=name,
        title=check.title,
        level=outcome.level if outcome.hits else "ok",
        count=len(outcome.hits),
        of=outcome.of,
        unit=outcome.unit,
        examples=tuple(outcome.hits[:EXAMPLES]),
        hint=outcome.hint,
    )


def worst(findings: Sequence[Finding]) -> Level:
    """The highest level among the findings."""
    return LEVELS[max((LEVELS.index(finding.level) for finding in findings), default=0)]
