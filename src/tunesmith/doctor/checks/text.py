"""Checks of text encoding: mojibake, double escapes, control characters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tunesmith.doctor.corpus import Case, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Outcome, by_share, quote

_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_REPLACED = "\ufffd"
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|#\d{2,6}|#x[0-9a-fA-F]{2,5});"
)
_MARKUP = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*[\s>/]|```|<!--|\bHTML\b|\bXML\b", re.IGNORECASE)
_AS_BYTE = {
    ord(bytes([byte]).decode("cp1252")): chr(byte)
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
"""Code points that Windows-1252 has at 0x80 to 0x9F, to the character with that number."""
_SEQUENCE = re.compile("[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
"""The bytes of one character in UTF-8, each as a character."""
_QUOTE_BEGUN = "\u00e2\u20ac"
"""What Windows-1252 makes of the first two bytes of curly quotes, dashes and the ellipsis."""
_PUNCTUATION = frozenset(
    "\u201c\u201d\u201e\u2018\u2019\u201a\u2039\u203a\u2026\u2013\u2014\u2122\u2020\u2021\u2022"
)
_PUNCTUATION |= frozenset("\xa0\xab\xbb\xae\xa9\xb0\xb7\xba\xaa\xb9\xb2\xb3\xbf\xa1\xb4")
"""What honest text writes right after a letter with an accent."""
_AROUND = 20  # characters shown before a finding


def encoding(corpus: Corpus, setup: Setup) -> Outcome:
    """UTF-8 read as another code, replacement characters, control characters."""
    hint = "read the source as UTF-8 again; what is replaced by U+FFFD is lost for good"
    return _look(corpus, _damage, "warning", hint)


def entities(corpus: Corpus, setup: Setup) -> Outcome:
    """HTML entities in texts that are not about HTML: escaped, and never unescaped."""
    hint = "html.unescape gives back the characters; a model learns to write what it is shown"
    return _look(corpus, _entity, None, hint)


def _look(
    corpus: Corpus, finder: Callable[[str], str | None], level: str | None, hint: str
) -> Outcome:
    hits = [hit for case in corpus.cases for hit in _first(case, finder)]
    of = len(corpus.cases)
    return Outcome(hits, of, "rows", "warning" if level else by_share(hits, of), hint)


def _first(case: Case, finder: Callable[[str], str | None]) -> Iterator[Hit]:
    """The first thing found in the row."""
    for place, text in case.texts():
        found = finder(text)
        if found is not None:
            yield Hit(str(case.origin), f"{place}: {found}")
            return


def _damage(text: str) -> str | None:
    if text.isascii() and text.isprintable():
        return None
    if (at := text.find(_REPLACED)) >= 0:
        return f"U+FFFD in {_near(text, at)}"
    if (misread := _misread(text)) is not None:
        return misread
    control = _CONTROL.search(text)
    if control is None:
        return None
    return f"U+{ord(control.group()):04X} in {_near(text, control.start())}"


def _misread(text: str) -> str | None:
    """UTF-8 whose bytes were each read as a character of Latin-1 or Windows-1252."""
    if (at := text.find(_QUOTE_BEGUN)) >= 0:
        return f"{_QUOTE_BEGUN!r} stands for a quotation mark or dash in {_near(text, at)}"
    for found in _SEQUENCE.finditer(text.translate(_AS_BYTE)):
        at = found.start()
        seen = text[at : found.end()]
        if _may_be_meant(seen, before=text[at - 1] if at else ""):
            continue
        try:
            meant = found.group().encode("latin-1").decode("utf-8")
        except UnicodeDecodeError:
            continue
        return f"{seen!r} stands for {meant!r} in {_near(text, at)}"
    return None


def _may_be_meant(seen: str, *, before: str) -> bool:
    """True if it may be a letter and closing punctuation, such as an accented e with a quote.

    The two letters with which most misread ones begin end a word in capitals only.
    """
    if not set(seen[1:]) <= _PUNCTUATION:
        return False
    return seen[0] not in "\u00c2\u00c3" or before.isupper()


def _entity(text: str) -> str | None:
    found = _ENTITY.search(text)
    if found is None or _MARKUP.search(text) is not None:
        return None
    return f"{found.group()} in {_near(text, found.start())}"


def _near(text: str, at: int) -> str:
    return quote(text[max(0, at - _AROUND) : at + 2 * _AROUND], 3 * _AROUND)
