"""Checks of duplicates and near-duplicates, also between training and held-out data
(contamination).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tunesmith.data.formats.examples import Completion, Parts, TemplatedText, Text, Tokens
from tunesmith.doctor.corpus import ASSISTANT, Case, Corpus, Setup
from tunesmith.doctor.minhash import near_pairs, plain
from tunesmith.doctor.outcome import FEW, Hit, Outcome, by_share

ALIKE = 0.8
"""With runs of three words this is about one changed word in 27."""
LEAST = 10
"""Different runs of words below which likeness says little."""


def exact(corpus: Corpus, setup: Setup) -> Outcome:
    """Training rows that say the same as an earlier one, but for case and white space."""
    first: dict[str, Case] = {}
    hits: list[Hit] = []
    for case in _readable(corpus.train):
        earlier = first.setdefault(case.key, case)
        if earlier is not case:
            hits.append(Hit(str(case.origin), f"the same as {earlier.origin}"))
    hint = "a row that is there n times weighs n times as much: remove the copies"
    return Outcome(hits, len(corpus.train), "rows", by_share(hits, len(corpus.train)), hint)


def near(corpus: Corpus, setup: Setup) -> Outcome:
    """Training rows that differ from an earlier one in a few words only."""
    cases = _unique(_readable(corpus.train))
    pairs = near_pairs([case.words for case in cases], threshold=ALIKE, least=LEAST)
    hits: list[Hit] = []
    seen: set[int] = set()
    for pair in pairs:
        same_task = cases[pair.first].tools == cases[pair.second].tools
        if same_task and pair.second not in seen:
            seen.add(pair.second)
            text = f"{pair.alike:.0%} like {cases[pair.first].origin}"
            hits.append(Hit(str(cases[pair.second].origin), text))
    hint = "keep one of each group, unless small differences are what is to be learned"
    return Outcome(hits, len(corpus.train), "rows", by_share(hits, len(corpus.train)), hint)


def conflicting(corpus: Corpus, setup: Setup) -> Outcome:
    """The same question with several answers."""
    asked: dict[str, dict[str, str]] = defaultdict(dict)
    hits: list[Hit] = []
    for answer in corpus.answers:
        if not answer.question:
            continue
        known = asked[plain(answer.context)]
        text = plain(answer.text)
        if known and text not in known:
            hits.append(Hit(answer.where, f"{next(iter(known.values()))} answers it otherwise"))
        known.setdefault(text, answer.where)
    hint = "nothing to mend if several answers are right; the model learns a mixture of them"
    return Outcome(hits, len(corpus.answers), "answers", "info", hint)


def leaked(corpus: Corpus, setup: Setup) -> Outcome:
    """Held-out rows that are also trained on, or whose question is."""
    trained: dict[str, Case] = {}
    for case in _readable(corpus.train):
        for key in _questions(case):
            trained.setdefault(key, case)
        trained.setdefault(case.key, case)
    hits: list[Hit] = []
    held = _held_out(corpus)
    for case in held:
        same = trained.get(case.key)
        asked = next((trained[key] for key in _questions(case) if key in trained), None)
        if same is not None:
            hits.append(Hit(str(case.origin), f"is trained on as {same.origin}"))
        elif asked is not None:
            hits.append(Hit(str(case.origin), f"its question is trained on in {asked.origin}"))
    level = "error" if len(hits) > FEW * len(held) else "warning"
    hint = "take these rows out of the training data: their loss says nothing about new questions"
    return Outcome(hits, len(held), "held-out rows", level, hint)


def nearly_leaked(corpus: Corpus, setup: Setup) -> Outcome:
    """Held-out rows that differ from a training row in a few words only."""
    held = _held_out(corpus)
    train = _unique(_readable(corpus.train))
    known = {case.key for case in train}
    fresh = [case for case in held if case.key not in known]
    cases = [*train, *fresh]
    pairs = near_pairs([case.words for case in cases], threshold=ALIKE, least=LEAST)
    hits: list[Hit] = []
    seen: set[int] = set()
    for pair in pairs:
        if pair.first < len(train) <= pair.second and pair.second not in seen:
            seen.add(pair.second)
            text = f"{pair.alike:.0%} like {cases[pair.first].origin}, which is trained on"
            hits.append(Hit(str(cases[pair.second].origin), text))
    hint = "take the like rows out of the training data, or don't trust this set"
    return Outcome(hits, len(held), "held-out rows", "warning", hint)


def _held_out(corpus: Corpus) -> list[Case]:
    return list(_readable(case for cases in corpus.held_out.values() for case in cases))


def _readable(cases: Iterable[Case]) -> Iterable[Case]:
    return (case for case in cases if case.example is not None)


def _unique(cases: Iterable[Case]) -> list[Case]:
    """The first of those that say the same."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.key, case)
    return list(first.values())


def _questions(case: Case) -> Sequence[str]:
    """The row's first question with what stands before it, as a key; none of a text."""
    if isinstance(case.example, Text | Parts | TemplatedText | Tokens):
        return []
    if isinstance(case.example, Completion):
        return ["?" + plain(case.example.prompt)]
    said: list[str] = []
    for message in case.messages:
        if message.role == ASSISTANT:
            break
        said.append(plain(message.content or ""))
    return ["?" + "\0".join([*said, case.tools])] if any(said) else []
