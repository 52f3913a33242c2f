"""Redaction of secrets: passwords in URLs, published forms of access tokens, and the values of
environment variables that are secret by their name or by their look.

A recipe with a secret is refused. In errors, logs and files of a run, secrets are written as `***`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast
from urllib.parse import quote

HIDDEN = "***"
_SHORTEST = 8
"""Values of environment variables that are shorter are not replaced: they could be any word."""
_NAME = re.compile(
    r"((TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|PASSCODE|CREDENTIAL|COOKIE|API_?KEY)S?"
    r"|(^|_)(PASS|PAT|PWD|KEY)|(ACCESS|PRIVATE|SECRET|AUTH|ACCOUNT|MASTER|SIGNING|ENCRYPTION)_?KEY)"
    r"($|_?\d+$|_ID$|_KEY$)"
)
_PUBLIC = re.compile(r"^PWD$|PUBLIC_?KEY")
_KNOWN = re.compile(
    r"PUBLIC_?KEY|(^|_)(SHA|SHA256|COMMIT|HASH|DIGEST|REVISION|VERSION|UUID|ID|NAME|PATH|"
    r"FILE|DIR|HOME|HOST|HOSTNAME|URL|URI|MODEL|CHECKSUM|TEST)$"
)
"""Names of variables whose values are random to look at and known to all."""
_LONG_HEX = re.compile(r"[0-9a-f]{32,}|[0-9A-F]{32,}")
_TEXT = re.compile(r"[\w.~+/=-]+")
_LONG_WORD = re.compile(r"[A-Za-z0-9]{20,}")
_PUBLISHED = (
    r"hf_|api_org_|ghp_|gho_|ghu_|ghs_|ghr_|github_pat_|glpat-|sk-|sk_live_|rk_live_|xox[abeprs]-|"
    r"gsk_|r8_|npm_|pypi-|nvapi-|pplx-|tgp_v1_|dop_v1_|wandb_v1_|lsv2_pt_|ya29\.|shpat_"
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
    (re.compile(rf"\b(?:{_PUBLISHED})[\w-]{{16,}}"), HIDDEN),
    (re.compile(r"\bAIza[\w-]{35}"), HIDDEN),
    (re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{8,}"), HIDDEN),  # JSON Web Token
    (re.compile(r"\bSG\.[\w-]{16,}\.[\w-]{16,}"), HIDDEN),
    (re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*(-----END [A-Z ]*-----)?"), HIDDEN),
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
            yield f"{key}.{name}" if key else str(name), str(name)
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list | tuple):
        for number, value in enumerate(cast("list[Any]", values)):
            yield from _texts(value, f"{key}.{number}")
    elif isinstance(values, str):
        yield key, values


def _secrets() -> list[str]:
    """The values of environment variables that are secret by their name or by their look, and the
    same as an address would hold them; longest first.
    """
    found = {value for name, value in os.environ.items() if _is_secret(name.upper(), value)}
    found |= {quote(value, safe="") for value in found}
    return sorted(found, key=len, reverse=True)


def _is_secret(name: str, value: str) -> bool:
    if len(value) < _SHORTEST:
        return False
    if _NAME.search(name) and not _PUBLIC.search(name):
        # the path of a file that holds the secret is none
        return not (value.startswith("/") and os.path.exists(value))
    return not _KNOWN.search(name) and looks_random(value)


def looks_random(value: str) -> bool:
    """True for a key or token: long hexadecimal numbers, or a long word in which capitals, small
    letters and digits take turns as they do not in a name.
    """
    if _LONG_HEX.fullmatch(value):
        return True
    found = _LONG_WORD.search(value)
    if found is None or _TEXT.fullmatch(value) is None or value[0] in "/.~":
        return False
    word = found.group()
    kinds = ["d" if sign.isdigit() else "u" if sign.isupper() else "l" for sign in word]
    turns = sum(one != other for one, other in pairwise(kinds))
    return len(set(kinds)) == 3 and turns * 5 >= len(word) * 2
