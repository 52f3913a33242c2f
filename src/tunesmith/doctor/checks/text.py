"""Damage to letters: text that was decoded wrongly, escaped once too often, or full of controls."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tunesmith.doctor.corpus import Case, Corpus, Setup
from tunesmith.doctor.outcome import Hit, Outcome, by_share, quote

_HIGH = re.compile(r"[^\x00-\x7f]{2,}")
_CONTROL = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_REPLACED = "\ufffd"
_ENTITY = re.compile(
    r"&(?:amp|lt|gt|quot|apos|nbsp|hellip|[mn]dash|[lr][sd]quo|#\d{2,6}|#x[0-9a-fA-F]{2,5});"
)
_MARKUP = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*[\s>/]|```|<!--|\bHTML\b|\bXML\b", re.IGNORECASE)
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
    if (control := _CONTROL.search(text)) is not None:
        return f"U+{ord(control.group()):04X} in {_near(text, control.start())}"
    for run in _HIGH.finditer(text):
        meant = _redecoded(run.group())
        if meant is not None:
            around = _near(text, run.start())
            return f"{quote(run.group(), 12)} stands for {quote(meant, 12)} in {around}"
    return None


def _redecoded(run: str) -> str | None:
    """What the characters were if they are UTF-8 bytes read one by one; None if they are not.

    A run of letters that means itself is next to never valid UTF-8 when written in one byte each.
    """
    # Codecs leave five bytes of Windows-1252 undefined; decoders that don't mind keep their number.
    by_bytes = "".join(_AS_BYTE.get(char, char) for char in run)
    try:
        meant = by_bytes.encode("latin-1").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return None
    return meant if len(meant) < len(run) and meant.isprintable() else None


_AS_BYTE = {
    bytes([byte]).decode("cp1252"): chr(byte)
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
"""Characters that Windows-1252 has at 0x80 to 0x9F, to the character with that number."""


def _entity(text: str) -> str | None:
    found = _ENTITY.search(text)
    if found is None or _MARKUP.search(text) is not None:
        return None
    return f"{found.group()} in {_near(text, found.start())}"


def _near(text: str, at: int) -> str:
    return quote(text[max(0, at - _AROUND) : at + 2 * _AROUND], 3 * _AROUND)
