"""Check of truncated answers, which end in the middle of a sentence."""

from __future__ import annotations

import json
import re

from tunesmith.doctor.corpus import Corpus, Setup
from tunesmith.doctor.outcome import Hit, Outcome, by_share, quote

LEAST = 8
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
    if words < LEAST:
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
