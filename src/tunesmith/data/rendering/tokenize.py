"""Batched tokenization: repeated texts are encoded once, and all ids are those of the tokenizer
itself.

Text between special tokens can be encoded apart from the rest, and words of byte-level BPE (GPT-2,
2019) apart from each other, so each distinct word goes through the tokenizer once.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from tunesmith.data.rendering.result import Wanted
from tunesmith.data.templates.template import Template
from tunesmith.types import IntArray

_CONTRACTIONS = r"'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_LONG = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}DIGITS"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def _long(digits: str) -> str:
    return (
        rf"{_ANY_CONTRACTION}|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{digits}"
        r"| ?[^\sA-Za-z0-9]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_SPLITS = {
    _LONG.replace("DIGITS", ""): _long(""),
    _LONG.replace("DIGITS", "{1,3}"): _long("{1,3}"),
}
"""Pre-tokenizer patterns of known tokenizers, and equivalent ones for ASCII text with Python's
`re`.
"""
# Letters are tried first because most words are letters; none of them begins like a contraction.
_GPT2 = rf" ?[A-Za-z]+|{_CONTRACTIONS}| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"
# Digits are split off first, so a run of spaces may end before a digit as before a space.
_GPT2_DIGITS = rf" ?[A-Za-z]+|{_CONTRACTIONS}|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?![^\s0-9])|\s+"
_BETWEEN_WORDS = re.compile("(?<=[A-Za-z])(?= [A-Za-z])")
"""Places where every pattern above ends a word, whatever else is in the text."""
_WORDS_KEPT = 1 << 17
_CHARACTERS_KEPT = 1 << 23
_PROBES = 48


class Encoder:
    """Encodes texts to the same ids as `template.encode`, with less work.

    Text between added tokens is encoded apart, each distinct piece once per call. ASCII pieces of
    the usual byte-level tokenizers are split into words, whose ids come from a table that the
    tokenizer itself filled. Both rely on the tokenizer's description of its parts and are tested on
    random text first; where the ids differ, whole texts go to the tokenizer.
    """

    def __init__(self, template: Template) -> None:
        self._template = template
        self._parts = _find_parts(template)
        self._table: dict[str, bytes] = {}
        self._characters = 0
        if self._parts is not None and not self._agrees():
            self._parts = None

    def encode(self, wanted: Sequence[Wanted]) -> list[IntArray]:
        """The ids of each text, in order. The arrays may be shared and are read-only."""
        found: dict[Wanted, IntArray] = {}
        if self._parts is None:
            for special in (False, True):
                texts = [text for text, marked in dict.fromkeys(wanted) if marked is special]
                rows = self._template.encode(texts, add_special_tokens=special)
                for text, ids in zip(texts, rows, strict=True):
                    found[text, special] = np.array(ids, np.int32)
        else:
            self._encode_parts(dict.fromkeys(wanted), self._parts, found)
        return [found[one] for one in wanted]

    def _encode_parts(
        self, wanted: Iterable[Wanted], parts: _Parts, found: dict[Wanted, IntArray]
    ) -> None:
        cuts = {text: parts.cut(text) for text, _ in wanted}
        pieces: dict[str, bytes] = dict(parts.added)
        distinct = {piece for cut in cuts.values() for piece in cut} - pieces.keys()
        self._add_pieces(distinct, parts.words, pieces)
        for text, special in wanted:
            ids = b"".join([pieces[piece] for piece in cuts[text]])
            if special:
                ids = parts.before + ids + parts.after
                if parts.bos is not None and ids[:8] == parts.bos * 2:
                    ids = ids[4:]
            found[text, special] = np.frombuffer(ids, np.int32)

    def _add_pieces(
        self, wanted: Iterable[str], words: re.Pattern[str], pieces: dict[str, bytes]
    ) -> None:
        # The table is emptied when it is full, which bounds its memory.
        if len(self._table) > _WORDS_KEPT or self._characters > _CHARACTERS_KEPT:
            self._table.clear()
            self._characters = 0
        found = {piece: _words(piece, words) for piece in wanted}
        table = self._table
        missing = list(set[str]().union(*found.values()).difference(table))
        table.update(zip(missing, self._plain(missing), strict=True))
        self._characters += sum(map(len, missing))
        get = table.__getitem__
        for piece, row in found.items():
            pieces[piece] = b"".join(map(get, row))

    def _plain(self, texts: list[str]) -> list[bytes]:
        backend: Any = self._template.tokenizer.backend_tokenizer
        if backend.truncation is not None or backend.padding is not None:
            return [_bytes(ids) for ids in self._template.encode(texts)]
        fast = getattr(backend, "encode_batch_fast", backend.encode_batch)
        return [_bytes(encoding.ids) for encoding in fast(texts, add_special_tokens=False)]

    def _agrees(self) -> bool:
        """True if random texts get the same ids as from the tokenizer itself."""
        texts = _probes(self._template)
        for special in (False, True):
            expected = self._template.encode(texts, add_special_tokens=special)
            mine = self.encode([(text, special) for text in texts])
            if any(a.tolist() != b for a, b in zip(mine, expected, strict=True)):
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Parts:
    """How a text can be split without a change of its ids; ids as the bytes of int32."""

    cutter: re.Pattern[str] | None  # matches added tokens, the longest first
    words: re.Pattern[str]  # matches the words of ASCII text
    added: Mapping[str, bytes]
    before: bytes
    after: bytes
    bos: bytes | None

    def cut(self, text: str) -> list[str]:
        """The pieces and added tokens of the text in order, none empty."""
        pieces = self.cutter.split(text) if self.cutter is not None else [text]
        return [piece for piece in pieces if piece]


def _words(piece: str, pattern: re.Pattern[str]) -> list[str]:
    """The words of a piece; a stretch that is not ASCII counts as one word."""
    if piece.isascii():
        return pattern.findall(piece)
    words: list[str] = []
    for stretch in _BETWEEN_WORDS.split(piece):
        if stretch.isascii():
            words += pattern.findall(stretch)
        else:
            words.append(stretch)
    return words


def _find_parts(template: Template) -> _Parts | None:
    """The parts of the template's tokenizer; None if texts can't be encoded in parts."""
    backend: Any = getattr(template.tokenizer, "backend_tokenizer", None)
    try:
        model = type(backend.model).__name__
        normalizer, splitter = _state(backend.normalizer), _state(backend.pre_tokenizer)
        after = _state(backend.post_processor)
    except AttributeError:
        return None
    added: dict[int, Any] = dict(template.tokenizer.added_tokens_decoder)
    plain = {bool(entry.normalized) for entry in added.values()}
    odd = any(entry.lstrip or entry.rstrip or entry.single_word for entry in added.values())
    whole = normalizer not in ({}, {"type": "NFC"}) or (normalizer and True in plain)
    if model != "BPE" or backend.model.dropout or odd or whole or len(plain) > 1:
        return None
    if backend.encode_special_tokens or getattr(template.tokenizer, "split_special_tokens", False):
        return None
    words = _word_pattern(splitter)
    if words is None or not _surrounds(after):
        return None
    bare, encoded = template.encode(["a"])[0], template.encode(["a"], add_special_tokens=True)[0]
    at = next((n for n in range(len(encoded)) if encoded[n : n + len(bare)] == bare), None)
    if at is None:
        return None
    texts = {str(entry.content): token for token, entry in added.items()}
    longest = sorted(texts, key=len, reverse=True)
    return _Parts(
        cutter=re.compile(f"({'|'.join(map(re.escape, longest))})") if texts else None,
        words=re.compile(words, re.ASCII),
        added={text: _bytes([token]) for text, token in texts.items()},
        before=_bytes(encoded[:at]),
        after=_bytes(encoded[at + len(bare) :]),
        bos=None if template.bos_id is None else _bytes([template.bos_id]),
    )


def _word_pattern(splitter: dict[str, Any]) -> str | None:
    """The word pattern of a byte-level tokenizer; None if it is not known."""
    steps = splitter.get("pretokenizers", [splitter])
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") is not False:
        return None
    before = steps[:-1]
    if last.get("use_regex") is True:
        if not before:
            return _GPT2
        digits = before == [{"type": "Digits", "individual_digits": True}]
        return _GPT2_DIGITS if digits else None
    if len(before) != 1 or before[0].get("type") != "Split" or before[0].get("invert"):
        return None
    pattern = cast("dict[str, Any]", before[0].get("pattern") or {}).get("Regex")
    return _SPLITS.get(pattern or "") if before[0].get("behavior") == "Isolated" else None


def _surrounds(state: dict[str, Any]) -> bool:
    """True if the post-processor only adds tokens around a text."""
    steps = state.get("processors", [state])
    return all(step.get("type") in (None, "ByteLevel", "TemplateProcessing") for step in steps)


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _probes(template: Template) -> list[str]:
    """Random texts of what a pattern may get wrong: runs of spaces, digits, quotes, added
    tokens.
    """
    made = random.Random(0)
    added = [str(entry.content) for entry in template.tokenizer.added_tokens_decoder.values()]
    ends = added[:3] + added[-3:]
    controls = [chr(code) for code in (9, 10, 11, 12, 13, 28, 31, 127)]
    atoms = [" ", "  ", "\n", "\n\n ", "\r\n", "a", "Word", " an", " if", "I'll", "'S", "'", "7"]
    atoms += ["12345", "x9", " $4.50", "...", "é", "日本", "`\t", "A's", "e\u0301", *controls]
    atoms += '!?.,_-+*/\\|<>()[]{}$#@%&^~`"'
    texts = ["".join(made.choices(atoms + ends, k=made.randint(1, 24))) for _ in range(_PROBES)]
    return [*texts, "", " ", "".join(a + b for a, b in itertools.product(atoms, [" ", "a", "1"]))]
