"""The HTML frame of a page, and escaping.

A page holds its style and its script and asks for nothing else; a content security policy in its
head names the hash of that script, so that a browser would run no other even if one got in.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re

from tunesmith.display import UNSEEN

_UNSEEN = re.compile(f"[{UNSEEN}]")
_SURROGATE = re.compile("[\ud800-\udfff]")

BASE_STYLE = """
:root{color-scheme:light dark;--page:#fff;--ink:#1b1f24;--faint:#57606a;--line:#d0d7de;
--panel:#f6f8fa;--learn:46 160 67;--heavy:191 57 137;--mark:#0550ae;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--page:#0d1117;--ink:#e6edf3;--faint:#9aa4af;
--line:#30363d;--panel:#161b22;--learn:63 185 80;--heavy:219 97 162;--mark:#79c0ff;--bad:#ff7b72}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:90rem;padding:1rem;
background:var(--page);color:var(--ink)}
h1{font-size:1.4rem}h2{font-size:1.1rem}a{color:var(--mark)}
table{border-collapse:collapse}caption{text-align:left;color:var(--faint)}
td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid var(--line);font-weight:400}
td:first-child,th:first-child{text-align:left}thead th{font-weight:600}
:focus-visible{outline:2px solid var(--mark);outline-offset:2px}
.faint{color:var(--faint)}
"""


def text(value: object) -> str:
    """`value` as text of a page, in an element or a quoted attribute; never markup.

    Characters that can't be seen, or that turn the direction of what follows, are shown by their
    code point, so that the page hides nothing of a row.
    """
    shown = _SURROGATE.sub("\ufffd", str(value))
    return html.escape(_UNSEEN.sub(_code, shown), quote=True)


def page(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """The whole file. `body`, `style` and `script` are markup and go in as they are."""
    rules = BASE_STYLE + style
    policy = f"default-src 'none'; style-src '{_hash(rules)}'; img-src data:; base-uri 'none'"
    if script:
        policy += f"; script-src '{_hash(script)}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{rules}</style></head>\n<body>{body}"
        + (f"<script>{script}</script>" if script else "")
        + "</body></html>\n"
    )


def table(caption: str, columns: list[str], rows: list[list[object]]) -> str:
    """A table of texts; the first cell of each row names it."""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in columns)
    lines = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>'
        + "".join(f"<td>{text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f"<table><caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{lines}</tbody></table>"
    )


def _code(found: re.Match[str]) -> str:
    return f"⟨U+{ord(found[0]):04X}⟩"


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
