"""Checks of the tokens around an answer: BOS, turn headers, stop tokens."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.data.formats.examples import Chat, Parts, TemplatedText, Text, Tokens
from tunesmith.data.templates.template import Template
from tunesmith.doctor.checks.faults import STOPS, fault_hits
from tunesmith.doctor.corpus import ASSISTANT, Case, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Outcome, quote
from tunesmith.types import Document

_WINDOW = 4
"""Tokens on each side of a boundary that are read as one text; merges reach no further."""


def stop_token(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers, completions and texts that don't end with a learned stop token."""
    hits = fault_hits(corpus.cases, STOPS)
    for case in corpus.cases:
        ends = _open_ends(case, setup.template)
        hits.extend(
            Hit(str(case.origin), f"{end} ends without a learned stop token") for end in ends
        )
    hint = "the template must close answers with a token that generation_config.json names as eos"
    return Outcome(hits, len(corpus.cases), "rows", "error", hint)


def _open_ends(case: Case, template: Template) -> Iterator[str]:
    """What in the whole document is learned to its end, but not its stop."""
    last: dict[int, int] = {}
    for segment in case.whole.segments if case.whole is not None else ():
        for index, message in zip(segment.index, segment.message, strict=True):
            last[int(message)] = int(segment.ids[index])
    for message, token in sorted(last.items()):
        chat = isinstance(case.example, Chat)
        answer = message >= 0 and case.messages[message].role == ASSISTANT
        if (answer or not chat) and token not in template.stop_ids:
            yield f"message {message}" if answer else "the text"


def beginning(corpus: Corpus, setup: Setup) -> Outcome:
    """Documents that begin with two BOS tokens, or without the one the tokenizer puts there."""
    bos = setup.template.bos_id
    wanted = bos is not None and setup.template.encode([""], add_special_tokens=True)[0][:1] == [
        bos
    ]
    hits: list[Hit] = []
    for case in corpus.cases:
        ids = case.whole.segments[0].ids[:2].tolist() if case.whole is not None else []
        if bos is not None and ids == [bos, bos]:
            hits.append(Hit(str(case.origin), "begins with two BOS tokens"))
        elif wanted and ids and ids[0] != bos:
            hits.append(Hit(str(case.origin), "begins without the BOS token"))
    hint = "the model has seen one BOS: let either the template or the tokenizer write it"
    return Outcome(hits, len(corpus.cases), "rows", "error", hint)


def boundary(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers whose first letters the tokenizer would merge with the end of their prompt.

    In use the prompt is tokenised alone, so this is how they are learned; but the model has mostly
    seen the merged form, and an answer is harder to begin in the other.
    """
    places: dict[tuple[tuple[int, ...], tuple[int, ...]], list[Case]] = {}
    for case in corpus.train:
        if case.whole is None or isinstance(case.example, Text | Parts | TemplatedText | Tokens):
            continue
        for border in set(_borders(case.whole)):
            places.setdefault(border, []).append(case)
    merged = _merged(list(places), setup.template)
    hits = [
        Hit(str(case.origin), f"{quote(before)} then {quote(after)} would be read as one")
        for border, (before, after) in merged.items()
        for case in places[border]
    ]
    hits.sort(key=lambda hit: hit.where)
    hint = "end prompts without white space, and begin answers without it"
    return Outcome(hits, len(corpus.train), "rows", "warning", hint)


_Border = tuple[tuple[int, ...], tuple[int, ...]]


def _borders(document: Document) -> Iterator[_Border]:
    """The tokens before and after the beginning of everything that is learned."""
    for segment in document.segments:
        before = None
        for index, message in zip(segment.index.tolist(), segment.message.tolist(), strict=True):
            begins = before is None or message != before[1] or index != before[0] + 1
            before = (index, message)
            if not begins:
                continue
            ids = segment.ids.tolist()
            tail = ids[max(0, index - _WINDOW) : index]
            if index == 0 and segment.parent >= 0:
                tail = document.segments[segment.parent].ids[-_WINDOW:].tolist()
            if tail:
                yield tuple(tail), tuple(ids[index : index + _WINDOW])


def _merged(borders: list[_Border], template: Template) -> dict[_Border, tuple[str, str]]:
    """The borders that vanish when both sides are tokenised as one text, with their texts."""
    open_ended = [
        border
        for border in borders
        if border[0][-1] not in template.special_ids and border[1][0] not in template.special_ids
    ]
    texts = [(template.decode(tail), template.decode(head)) for tail, head in open_ended]
    joint = template.encode([before + after for before, after in texts])
    suspects = [
        number for number, (tail, head) in enumerate(open_ended) if joint[number] != [*tail, *head]
    ]
    # A window may itself begin or end inside a word: only what is stable alone can be judged.
    apart = template.encode([text for number in suspects for text in texts[number]])
    return {
        open_ended[number]: texts[number]
        for at, number in enumerate(suspects)
        if (tuple(apart[2 * at]), tuple(apart[2 * at + 1])) == open_ended[number]
    }


def unknown_tokens(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows with the tokenizer's unknown token: characters that the model can't read."""
    unknown = setup.template.tokenizer.unk_token_id
    used = None if unknown in setup.template.stop_ids else unknown
    hits = [
        Hit(str(case.origin), f"{count} unknown tokens")
        for case in corpus.cases
        if used is not None
        and case.whole is not None
        and (count := sum(int((s.ids == used).sum()) for s in case.whole.segments))
    ]
    hint = "write these characters in another way, or take a model that knows them"
    return Outcome(hits, len(corpus.cases), "rows", "warning", hint)


def outside_vocabulary(corpus: Corpus, setup: Setup) -> Outcome:
    """Rows with ids for which the model has no embedding."""
    size = setup.vocabulary
    hits = [
        Hit(str(case.origin), f"id {highest}; the model has {size:,}")
        for case in corpus.cases
        if size is not None
        and case.whole is not None
        and (highest := max(int(s.ids.max()) for s in case.whole.segments)) >= size
    ]
    hint = "tokenizer and model don't belong together, or tokens were added without embeddings"
    return Outcome(hits, len(corpus.cases), "rows", "error", hint)
