"""Word tokenization of texts, with which answers are compared."""

from __future__ import annotations

import re
import unicodedata

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """Lower-case words; a character of a script without spaces is a word of its own."""
    return _WORD.findall(text.lower())


def plain(text: str) -> str:
    """The text with one Unicode form, one case and single spaces, so that equal reads equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
