"""What is written to a terminal: foreign text without control characters, and streams whose failing
ends nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff"
"""C0 but for tab and line feed, C1, invisible characters, and those that turn the direction of
writing (bidirectional controls), as the inside of a character class.
"""
_CONTROLS = re.compile(f"[{UNSEEN}\ud800-\udfff]")


def shown(text: object) -> str:
    r"""The text as it may be written to a terminal: control characters as `\u001b`.

    Every text from rows, files, models and recipes goes through here before it is printed: an
    escape sequence could otherwise clear the screen, set the clipboard or fake a line. In JSON the
    result means the same as the text did.
    """
    return _CONTROLS.sub(lambda found: f"\\u{ord(found.group()):04x}", str(text))


def put(*texts: object, end: str = "\n", file: TextIO | None = None, flush: bool = False) -> None:
    """`print` for text that may be foreign."""
    print(*map(shown, texts), end=end, file=file, flush=flush)


class Unfailing:
    """A text stream that drops what can't be written: its reader is gone, or its disk is full.

    What a run shows must never end it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of the stream."""
        with suppress(OSError, ValueError):  # a ValueError: it is closed
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def unfailing(stream: TextIO) -> TextIO:
    """The stream, so that writing to it raises nothing."""
    return stream if isinstance(stream, Unfailing) else cast("TextIO", Unfailing(stream))


@contextmanager
def unfailing_stderr() -> Iterator[None]:
    """Within, nothing that writes to standard error fails for that, libraries and logs included."""
    before = sys.stderr
    sys.stderr = unfailing(before)
    try:
        yield
    finally:
        sys.stderr = before
