"""Checks of the targets of each row: none, few, or truncated."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.formats.examples import Chat
from tunesmith.data.rendering.render import NO_TARGETS
from tunesmith.doctor.corpus import ASSISTANT, Case, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Level, Outcome

SPARSE = 0.005
"""Share of targets below which a row costs 200 times the tokens that it teaches."""


def unsupervised(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows without a target: they teach nothing."""
    hits = [
        Hit(str(case.origin), _no_target(case))
        for case in corpus.train
        if case.rendered is not None and case.rendered.reason == NO_TARGETS
    ]
    level: Level = "error" if len(hits) == len(corpus.train) else "warning"
    hint = "an assistant turn or another role must be learned: look at data.train_on and `train`"
    return Outcome(hits, len(corpus.train), "rows", level, hint)


def _no_target(case: Case) -> str:
    roles = ", ".join(dict.fromkeys(message.role for message in case.messages))
    return f"no token to learn; the turns are of {roles}" if roles else "no token to learn"


def sparse(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows with fewer than one target in 200 tokens, or an answer of a stop token alone."""
    hits: list[Hit] = []
    for case in corpus.train:
        document = case.whole
        if document is None:
            continue
        targets, tokens = document.target_tokens, document.tokens
        if targets < SPARSE * tokens or targets < 2:
            hits.append(Hit(str(case.origin), f"{targets} targets in {tokens:,} tokens"))
    hint = "if more of these rows is to be learned, look at data.train_on; else shorten prompts"
    return Outcome(hits, len(corpus.train), "rows", "warning", hint)


def prompts_trained(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats in which something other than the answers is learned."""
    hits: list[Hit] = []
    chats = 0
    for case in corpus.train:
        if not isinstance(case.example, Chat) or case.whole is None:
            continue
        chats += 1
        learned = case.trained_messages()
        roles = {case.messages[n].role for n in learned if n >= 0} - {ASSISTANT}
        if roles or -1 in learned:
            hits.append(Hit(str(case.origin), f"learned too: {', '.join(sorted(roles)) or 'all'}"))
    hint = "data.train_on=assistant learns the answers alone"
    return Outcome(hits, chats, "chats", "info", hint)


def truncated(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows over `max_length`, and what the policy for them costs."""
    levels: dict[str, Level] = {"error": "error", "split": "info"}
    hits = [Hit(str(case.origin), _cut(case, setup)) for case in corpus.cases if case.over_long]
    hint = (
        f"data.max_length is {setup.max_length}; a larger one keeps these rows whole; else "
        "data.too_long=drop, truncate or split"
    )
    level = levels.get(setup.too_long, "warning")
    return Outcome(hits, len(corpus.cases), "rows", level, hint)


def _cut(case: Case, setup: Setup) -> str:
    length = f"{case.length:,} tokens on its longest path"
    if setup.too_long == "error":
        return f"{length}: a run would stop here"
    kept = case.rendered.document if case.rendered is not None else None
    if kept is None:
        return f"{length}: left out"
    lost = (case.whole.target_tokens if case.whole else 0) - kept.target_tokens
    return f"{length}: {lost:,} targets are lost" if lost > 0 else f"{length}: split"


def unanswered(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats that go on after the last learned turn: that part is not used."""
    hits = [
        Hit(str(case.origin), f"{case.rendered.unused} tokens after the last answer")
        for case in corpus.train
        if case.rendered is not None and case.rendered.unused
    ]
    hint = "nothing to mend, unless an answer is missing at the end"
    return Outcome(hits, len(corpus.train), "rows", "info", hint)


def branching(corpus: Corpus, setup: Setup) -> Outcome:
    """Chats whose earlier turns the template writes in another way later on."""
    hits = [
        Hit(str(case.origin), f"{leaves} contexts, one for each way the history is written")
        for case in corpus.train
        if case.whole is not None
        and len(case.trained_messages()) > 1
        and (leaves := len(list(_leaves(case)))) > 1
    ]
    hint = "nothing to mend: every answer is learned in exactly the context it has in use"
    return Outcome(hits, len(corpus.train), "rows", "info", hint)


def _leaves(case: Case) -> Iterator[int]:
    segments = case.whole.segments if case.whole is not None else ()
    parents = {segment.parent for segment in segments}
    yield from (number for number in range(len(segments)) if number not in parents)
