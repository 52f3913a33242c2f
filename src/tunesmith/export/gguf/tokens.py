"""The tokenizer as GGUF metadata (llama.cpp's tokenizer models)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"\p{N}" + _REST: "qwen2",
}
"""Regular expressions that cut text before merging, and what runtimes call them."""
SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`model` is "gpt2" (byte-level BPE with `merges` and `pre`) or "llama" (SentencePiece, with
    `scores`).
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list[str])
    scores: list[float] = field(default_factory=list[float])
    space_prefix: bool = False


def read_vocabulary(template: Template, rows: int) -> Vocabulary:
    """The tokenizer's vocabulary, filled up to the `rows` of the embedding.

    Raises:
        ModelError: a kind of tokenizer that can't be written, or more tokens than rows.
    """
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json to read its merges from")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise ModelError(f"a tokenizer of the kind {model['type']} can't be written as .gguf")
    tokens, types = _tokens(parts, rows)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not model.get("byte_fallback"):
        return Vocabulary("gpt2", pre_tokenizer(parts), tokens, types, merges=merges)
    if any(merge.count(" ") != 1 for merge in merges):
        raise ModelError("the tokenizer merges pieces with spaces in them")
    return Vocabulary(
        "llama", "default", tokens, types, scores=_scores(tokens, types, merges),
        space_prefix=_has_space_prefix(parts, template.has_chat_template),
    )  # fmt: skip


def pre_tokenizer(parts: dict[str, Any]) -> str:
    """The name by which runtimes know how this tokenizer.json cuts text before merging.

    Raises:
        ModelError: none is known that cuts so.
    """
    normalizer = (parts["normalizer"] or {}).get("type")
    found = parts["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    name = _name(steps, bool(parts["model"].get("ignore_merges")))
    # Qwen composes characters first; runtimes leave that out, which composed text doesn't show.
    if name is None or (normalizer is not None and (name, normalizer) != ("qwen2", "NFC")):
        shown = json.dumps([normalizer, *steps], ensure_ascii=False)[:300]
        raise ModelError(
            f"no runtime's name is known for the tokenizer's pre-tokenizer {shown}",
            hint="known are gpt-2, smollm, llama-bpe, qwen2; --to hf keeps the tokenizer as it is",
        )
    return name


def _name(steps: list[dict[str, Any]], ignore_merges: bool) -> str | None:
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if len(steps) == 1:
        return "gpt-2" if last["use_regex"] and not ignore_merges else None
    first = steps[0]
    if len(steps) != 2:
        return None
    if first["type"] == "Digits":
        fits = first["individual_digits"] and last["use_regex"] and not ignore_merges
        return "smollm" if fits else None
    if first["type"] != "Split" or last["use_regex"]:
        return None
    name = _SPLITS.get(first["pattern"].get("Regex", ""))
    plain = first["behavior"] == "Isolated" and not first["invert"]
    return name if plain and ignore_merges == (name == "llama-bpe") else None


def _tokens(parts: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    model = parts["model"]
    texts: dict[int, str] = {number: text for text, number in model["vocab"].items()}
    kinds = {number: _kind(text, model) for number, text in texts.items()}
    for token in parts["added_tokens"]:
        number, text = token["id"], token["content"]
        if model.get("byte_fallback") and not token["special"]:
            text = text.replace(SPACE, " ")
        texts[number] = text
        if kinds.get(number) != UNKNOWN:
            kinds[number] = CONTROL if token["special"] else USER
    if max(texts) >= rows:
        raise ModelError(f"the tokenizer has id {max(texts)}, the embedding only {rows} rows")
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(rows)]
    return tokens, [kinds.get(number, UNUSED) for number in range(rows)]


def _kind(text: str, model: dict[str, Any]) -> int:
    if not model.get("byte_fallback"):
        return NORMAL
    if text == model.get("unk_token"):
        return UNKNOWN
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair with the best score; merges are listed best first."""
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault(merge.replace(" ", "", 1), len(order))
    last = len(order)
    return [
        float(-order.get(token, last)) if kind == NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]


def _has_space_prefix(parts: dict[str, Any], chat: bool) -> bool:
    """True if each text after a special token begins with a space."""
    normalizer = parts["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    if any(step.get("type") == "Prepend" for step in steps):
        return True
    scheme = (parts["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    # "first" is the start of the whole text alone, where a chat has a special token.
    return scheme == "always" or (scheme == "first" and not chat)


REGEX_OF = {name: regex for regex, name in _SPLITS.items()}
