"""Checks of answers: empty, repeated, copied from the question, or dominated by one phrase."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tunesmith.doctor.checks.faults import EMPTY, fault_hits, refusal
from tunesmith.doctor.corpus import ASSISTANT, Answer, Corpus, Setup
from tunesmith.doctor.minhash import near_pairs, plain
from tunesmith.doctor.outcome import Hit, Level, Outcome, by_share, quote

PLACEHOLDERS = frozenset(
    {"nan", "null", "undefined", "todo", "tbd", "[deleted]", "[removed]", "...", "…", "<answer>"}
    | {"[answer]", "your answer here", "lorem ipsum", "no response", "<no response>"}
)
"""Answers that stand for a missing one. Words that also answer questions (none, n/a) are not in."""
LONG_ENOUGH = 8
"""Words from which two answers are not the same by chance or because they are labels."""
CROWD = 3
"""Different questions that get (nearly) the same answer before it is called a pattern."""
ALIKE = 0.7
OPENING = 5
"""Words of an opening."""
LOOP_WORDS, LOOP_COPIES, LONGEST_UNIT = 20, 4, 60
"""A loop is a unit of up to 60 words, said at least 4 times in a row, 20 words or more in all."""
LOOP_CHARACTERS = 60
_MARKERS = re.compile(
    r"<\|?(?:im_start|im_end|eot_id|start_header_id|endoftext|assistant|user|system|end_of_text)\|>"
    r"|<(?:start|end)_of_turn>|\[/?INST\]|<</?SYS>>|^#{2,3} ?(?:Instruction|Response|Input):"
    r"|^(?:Human|User|HUMAN|USER): .*?^(?:Assistant|AI|ASSISTANT|Bot|Human|User|HUMAN|USER): ",
    re.MULTILINE | re.DOTALL,
)
_QUOTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
"""Code, in which marks are talked about."""
_STUCK = re.compile(rf"([^\s\-_=*#.~─━•|+/\\])\1{{{LOOP_CHARACTERS - 1},}}")
SENTENCE_WORDS = 8
"""Words from which an answer is a sentence and not a label."""
_ENGLISH = """
a an the and or but nor of to with from into onto upon than because although whereas if
unless while my your his its our their
"""
_OPEN_WORDS = frozenset(_ENGLISH.split())
"""Words that hardly ever end a sentence; without a mark after them something is missing."""
_FENCE = re.compile(r"^ *```[^`\n]*$", re.MULTILINE)
"""A line that opens or closes a code block; one with more backquotes is code in a sentence."""
_LAST_WORD = re.compile(r"([a-z]+)\Z")


def empty(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers without content, or with a word that stands for a missing one."""
    faults = fault_hits(corpus.cases, EMPTY)
    hits = [
        Hit(answer.where, f"the answer is {quote(answer.text)}")
        for answer in corpus.answers
        if answer.text.strip().lower() in PLACEHOLDERS or not answer.text.strip()
    ]
    hits += [
        Hit(str(case.origin), f"message {number} ({ASSISTANT}) is empty")
        for case in corpus.train
        if case.fault is None
        for number, message in enumerate(case.messages)
        if message.role == ASSISTANT and message.empty
    ]
    level: Level = refusal(setup) if faults else "warning"
    hint = "take these rows out: a model learns to say nothing from them"
    return Outcome([*faults, *hits], len(corpus.cases), "rows", level, hint)


def repeated(corpus: Corpus, setup: Setup) -> Outcome:
    """Whole sentences that answer three or more different questions, word for word."""
    same: dict[str, list[Answer]] = defaultdict(list)
    for answer in corpus.answers:
        if answer.question and len(answer.words) >= LONG_ENOUGH:
            same[" ".join(answer.words)].append(answer)
    hits = [
        Hit(answer.where, f"{quote(answer.text)} answers {questions} questions")
        for group in same.values()
        if (questions := len({plain(answer.context) for answer in group})) >= CROWD
        for answer in group
    ]
    hint = "keep a few of each: the model will give such an answer to anything"
    return Outcome(hits, len(corpus.answers), "answers", by_share(hits, len(corpus.answers)), hint)


def collapse(corpus: Corpus, setup: Setup) -> Outcome:
    """Different questions with nearly, but not exactly, the same long answer."""
    answers = [answer for answer in corpus.answers if answer.question]
    pairs = near_pairs([answer.words for answer in answers], threshold=ALIKE, least=LONG_ENOUGH)
    first: dict[int, int] = {}
    for pair in pairs:
        first.setdefault(pair.second, first.get(pair.first, pair.first))
    groups: dict[int, list[int]] = defaultdict(list)
    for number, leader in first.items():
        groups[leader].append(number)
    hits: list[Hit] = []
    for leader, members in groups.items():
        group = [answers[number] for number in (leader, *members)]
        questions = len({plain(answer.context) for answer in group})
        texts = len({tuple(answer.words) for answer in group})
        if questions >= CROWD and texts > 1:
            like = f"like {group[0].where}: {quote(group[0].text)}"
            hits.extend(Hit(answer.where, like) for answer in group[1:])
    hint = "answers made from one pattern teach the pattern; vary them, or keep a few"
    return Outcome(hits, len(answers), "answers", by_share(hits, len(answers)), hint)


def opening(corpus: Corpus, setup: Setup) -> Outcome:
    """One opening of five words that a third of all long answers share."""
    long = [answer for answer in corpus.answers if len(answer.words) >= 2 * OPENING]
    counts = Counter(tuple(answer.words[:OPENING]) for answer in long)
    most, count = counts.most_common(1)[0] if counts else ((), 0)
    hits: list[Hit] = []
    if count >= max(10, len(long) / 3):
        alike = [answer for answer in long if tuple(answer.words[:OPENING]) == most]
        hits = [Hit(answer.where, f"begins {quote(answer.text)}") for answer in alike]
    hint = "nothing to mend if it is the format you want; else a habit the model will take over"
    return Outcome(hits, len(long), "answers", "info", hint)


def echo(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers that begin by repeating the whole question."""
    asked = [answer for answer in corpus.answers if answer.question]
    hits = [
        Hit(answer.where, f"repeats {quote(answer.question)}")
        for answer in asked
        if _repeats(answer)
    ]
    hint = "cut the question out of the answer, unless repeating it is the task"
    return Outcome(hits, len(asked), "answers", "warning", hint)


def _repeats(answer: Answer) -> bool:
    question = plain(answer.question)
    return len(question.split()) >= LONG_ENOUGH and plain(answer.text).startswith(question)


def markers(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers in which another turn begins: role names or the marks of some chat template."""
    hits = [
        Hit(answer.where, f"{quote(found.group())} in the answer")
        for answer in corpus.answers
        if answer.question and (found := _MARKERS.search(_QUOTED.sub("", answer.text))) is not None
    ]
    hint = "a conversation was pasted into one answer: split it into turns"
    return Outcome(hits, len(corpus.answers), "answers", "warning", hint)


def loops(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers that say one phrase over and over, as language models do when they get stuck."""
    answers = corpus.answers
    looping = dict(_word_loops([answer.words for answer in answers]))
    hits: list[Hit] = []
    for number, answer in enumerate(answers):
        stuck = _STUCK.search(answer.text)
        if number in looping:
            hits.append(Hit(answer.where, f"says {quote(looping[number])} again and again"))
        elif stuck is not None:
            hits.append(Hit(answer.where, f"{len(stuck.group())} times {stuck.group(1)!r}"))
    hint = "take these rows out: whatever wrote them had stopped making sense"
    return Outcome(hits, len(answers), "answers", "warning", hint)


def _word_loops(texts: Sequence[Sequence[str]]) -> Iterator[tuple[int, str]]:
    """Number of each text with a loop, and its unit.

    Words of all texts lie in one row of numbers; a loop of unit u is a stretch in which each
    number equals the one u places before it. Works one unit length at a time over everything.
    """
    numbers: dict[str, int] = {}
    lengths = [len(words) for words in texts]
    row = [numbers.setdefault(word, len(numbers)) for words in texts for word in words]
    codes = np.array(row, np.int32)
    owner = np.repeat(np.arange(len(texts)), lengths)
    begin = np.concatenate([[0], np.cumsum(lengths)])
    found: set[int] = set()
    for unit in range(1, LONGEST_UNIT + 1):
        if len(codes) <= unit:
            return
        same = (codes[unit:] == codes[:-unit]) & (owner[unit:] == owner[:-unit])
        least = max((LOOP_COPIES - 1) * unit, LOOP_WORDS - unit)
        for start in _long_stretches(same, least):
            text = int(owner[start])
            if text not in found:
                found.add(text)
                at = start - int(begin[text])
                yield text, " ".join(texts[text][at : at + unit])


def _long_stretches(same: NDArray[np.bool_], least: int) -> list[int]:
    """Where stretches of at least `least` True begin."""
    edges = np.diff(np.concatenate([[False], same, [False]]).astype(np.int8))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return starts[ends - starts >= least].tolist()


def cut_off(corpus: Corpus, setup: Setup) -> Outcome:
    """Answers that end in an open code block, in unfinished JSON, at a comma or at a word like
    `the`, of English sentences.
    """
    hits = [
        Hit(answer.where, f"{reason}: {quote(answer.text[-40:])}")
        for answer in corpus.answers
        if (reason := _broken(answer.text.rstrip(), len(answer.words)))
    ]
    of = len(corpus.answers)
    hint = "finish these answers or take them out: a model learns to stop where they do"
    return Outcome(hits, of, "answers", by_share(hits, of), hint)


def _broken(text: str, words: int) -> str | None:
    if len(_FENCE.findall(text)) % 2:
        return "a code block is not closed"
    if text[:1] in ("{", "[") and _unfinished(text):
        return "JSON is not finished"
    if words < SENTENCE_WORDS:
        return None
    if text.endswith(","):
        return "ends with a comma"
    last = _LAST_WORD.search(text)
    if last is not None and last.group() in _OPEN_WORDS:
        return f"ends with {last.group()!r}"
    return None


def _unfinished(text: str) -> bool:
    """True if JSON goes wrong only where the text ends."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or error.msg.startswith("Unterminated string")
    except RecursionError:
        return False
    return False
