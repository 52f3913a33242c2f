"""Reader of JSON Lines: one object on each line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tunesmith.data.row_errors import NOT_JSON, NOT_UTF8, Fault
from tunesmith.data.sources.readers.rows import Raw, object_row, too_many

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def jsonl_rows(lines: Iterable[bytes]) -> Iterator[Raw]:
    """One row for each line that is not blank; faults name the line, counted from 1."""
    for number, line in enumerate(lines, start=1):
        content = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield _parse_line(content, number)


def _parse_line(line: bytes, number: int) -> Raw:
    place = f"line {number}"
    if too_many(line):
        return None, Fault("invalid-json", f"{place} holds too many values for a row", NOT_JSON)
    try:
        text = line.decode()
        values = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            # Half of a surrogate pair is valid JSON, yet no tokenizer can take it.
            json.dumps(values, ensure_ascii=False).encode()
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        message = f"{place} is not UTF-8 text ({error.reason})"
        return None, Fault("invalid-encoding", message, NOT_UTF8)
    except json.JSONDecodeError as error:
        message = f"{place} is not JSON: {error.msg} at character {error.pos + 1}"
        return None, Fault("invalid-json", message, NOT_JSON)
    except (ValueError, RecursionError) as error:
        return None, Fault("invalid-json", f"{place} is not JSON: {error}", NOT_JSON)
    return object_row(values, place, size=len(line))
