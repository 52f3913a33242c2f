"""Redaction of secrets: passwords in URLs, access tokens, secret environment variables.

A recipe with a secret is refused. In errors, logs and files of a run, secrets are written as `***`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

HIDDEN = "***"
_SHORTEST = 8
"""Values of environment variables that are shorter are not replaced: they could be any word."""
_NAME = re.compile(
    r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|API_?KEY|(ACCESS|PRIVATE|SECRET)_KEY)"
    r"($|_ID$|_KEY$)"
)
_SHAPES = (
    (re.compile(r"(\b[A-Za-z][\w+.-]*://)[^/\s@]+@"), rf"\1{HIDDEN}@"),
    (
        re.compile(
            r"(?i)([?&](?:[\w-]*(?:token|secret|password|signature|api_?key|credential)|sig|key)=)"
            r"[^&\s'\"]+"
        ),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"\b(?:hf_|ghp_|gho_|github_pat_|glpat-|sk-|xox[abp]-)[\w-]{16,}"), HIDDEN),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
    (re.compile(r"(?i)(\bBearer\s+)[\w.~+/-]{8,}=*"), rf"\1{HIDDEN}"),
)


def redact(text: str, *, known: Sequence[str] | None = None) -> str:
    """The text with every secret replaced by `***`.

    `known` are the secrets of the environment; None reads them from it.
    """
    for value in _secrets() if known is None else known:
        text = text.replace(value, HIDDEN)
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


def secret_keys(values: Any) -> Iterator[str]:
    """The dotted keys of texts in nested values that hold a secret."""
    known = _secrets()
    for key, text in _texts(values, ""):
        if redact(text, known=known) != text:
            yield redact(key, known=known)


def _texts(values: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(values, Mapping):
        for name, value in cast("Mapping[Any, Any]", values).items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(cast("list[Any]", values)):
            yield from _texts(value, f"{key}.{number}")
    elif isinstance(values, str):
        yield key, values


def _secrets() -> list[str]:
    """The values of environment variables whose names mean a secret, longest first."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _NAME.search(name.upper())
    }
    return sorted(found, key=len, reverse=True)
