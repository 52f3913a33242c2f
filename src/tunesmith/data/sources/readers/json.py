"""Streaming reader of JSON: a list of objects, one object, an object with one list of rows, or
objects one after the other.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, BinaryIO, cast

from tunesmith.data.fields.table import FORMATS
from tunesmith.data.row_errors import NOT_JSON, NOT_UTF8, Fault
from tunesmith.data.sources.readers.rows import LONGEST, Raw, object_row, too_long, too_many
from tunesmith.errors import DataError

Lines = Callable[[Any, str], Iterator[bytes]]
_BLOCK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_FILE = "a JSON file is a list of objects, or objects one after the other"
_NEAR_THE_END = 16
"""Characters before the end of the buffer in which an error may be that of a value cut in two."""


def json_rows(file: BinaryIO, name: str, columns: Mapping[str, str] | None = None) -> Iterator[Raw]:
    """The rows of a JSON file; a list is read value by value and never held as a whole. `columns`
    are our names of columns to the file's.

    Raises:
        DataError: it is not JSON, not UTF-8, or holds no list of rows.
    """
    text = _Buffer(file, name)
    first = text.peek()
    if first == "[":
        yield from _listed(text)
    elif first:
        parsed, raw = text.value()
        if text.peek() or _is_row(parsed, columns or {}):
            yield _row(parsed, raw, 0)
            yield from _one_after_the_other(text)
        else:
            for number, values in enumerate(_row_list(parsed, name)):
                yield _row(values, raw, number)


def _listed(text: _Buffer) -> Iterator[Raw]:
    text.take()
    number = 0
    if text.peek() != "]":
        while True:
            yield _row(*text.value(), number)
            number += 1
            if text.peek() != ",":
                break
            text.take()
    if text.peek() != "]":
        raise text.error("Expecting ',' delimiter" if text.peek() else "the list has no end")
    text.take()
    if text.peek():
        raise text.error("Extra data")


def _one_after_the_other(text: _Buffer) -> Iterator[Raw]:
    number = 1
    while text.peek():
        yield _row(*text.value(), number)
        number += 1


def _row(values: Any, raw: str, number: int) -> Raw:
    place = f"item {number}"
    if "\\ud" in raw or "\\uD" in raw:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            message = f"{place} is not UTF-8 text ({error.reason})"
            return None, Fault("invalid-encoding", message, NOT_UTF8)
    return _object(values, raw, place)


def _object(values: Any, text: str, place: str) -> Raw:
    """The row, unless it has a column twice, of which Python's parser keeps the last."""
    if isinstance(values, dict):
        for name in cast("dict[str, Any]", values):
            if text.count(f'"{name}"') > 1 and name in _doubled(text):
                message = f"{place} has the column `{name}` more than once"
                return None, Fault("doubled-column", message, "keep one of them")
    return object_row(values, place, size=len(text))


def _doubled(text: str) -> list[str]:
    """The names that the outermost object of a JSON text has more than once."""
    pairs: list[list[tuple[str, Any]]] = []

    def keep(found: list[tuple[str, Any]]) -> None:
        pairs.append(found)

    json.loads(text, object_pairs_hook=keep)  # the outermost object is the last to be complete
    counts = Counter(name for name, _ in pairs[-1])
    return [name for name, count in counts.items() if count > 1]


def _is_row(parsed: Any, columns: Mapping[str, str]) -> bool:
    """True if the file's only object has the columns of a format, so that it is a row.

    A single column with a list of objects that are rows themselves is a list of rows.
    """
    if not isinstance(parsed, dict):
        return False
    values = cast("dict[str, Any]", parsed)
    for needed in FORMATS.values():
        names = [columns.get(name, name) for name in needed]
        if all(name in values for name in names):
            only = values[names[0]] if len(values) == 1 else None
            first = cast("list[Any]", only)[0] if isinstance(only, list) and only else None
            return not (isinstance(first, dict) and names[0] in first)
    return False


def _row_list(parsed: Any, name: str) -> list[Any]:
    """The only list in a file's top-level object."""
    fields = cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}
    lists = [cast("list[Any]", value) for value in fields.values() if isinstance(value, list)]
    if len(lists) != 1:
        raise DataError(
            f"not a list of objects, nor an object with one list ({len(lists)} lists found)",
            where=name,
            hint='write [{...}, {...}] or {"data": [{...}, {...}]}',
        )
    return lists[0]


class _Buffer:
    """The text of a file that is parsed value by value; what is parsed is let go."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text = ""
        self._at = 0
        self._ended = False
        self._line = 1  # of the text's first character
        self._column = 1

    def peek(self) -> str:
        """The next character that is not a space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._fill()

    def take(self) -> None:
        """Pass over the character that `peek` showed."""
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """The next value, and its text."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_be_cut(error):
                    raise self.error(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"not JSON: {error}", where=self._name, hint=_FILE) from error
            else:
                if end < len(self._text) or self._ended:
                    raw = self._text[self._at : end]
                    self._at = end
                    return value, raw
            self._fill()

    def error(self, message: str, at: int | None = None) -> DataError:
        """What is wrong, with the line and column of a place in the text."""
        before = self._text[: self._at if at is None else at]
        line = self._line + before.count("\n")
        column = len(before) - before.rfind("\n") if "\n" in before else self._column + len(before)
        return DataError(
            f"not JSON: {message} at line {line}, column {column}", where=self._name, hint=_FILE
        )

    def _may_be_cut(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated") or error.pos >= len(self._text) - _NEAR_THE_END

    def _fill(self) -> None:
        """Read on: as much again as is waiting, so that a long value costs no more than twice."""
        done = self._text[: self._at]
        if "\n" in done:
            self._line += done.count("\n")
            self._column = len(done) - done.rfind("\n")
        else:
            self._column += len(done)
        rest = self._text[self._at :]
        if len(rest) > LONGEST:
            raise too_long(f"the value on line {self._line}", self._name)
        if too_many(rest):
            raise DataError(
                f"the value on line {self._line} holds too many others",
                where=self._name,
                hint=_FILE,
            )
        block = self._file.read(max(_BLOCK, len(rest)))
        self._ended = not block
        try:
            self._text = rest + self._decode.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(
                f"not UTF-8 text: {error.reason}", where=self._name, hint=NOT_UTF8
            ) from error
        self._at = 0


_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def lines_or_list(file: BinaryIO, name: str, lines: Lines) -> Iterator[Raw]:
    """The rows of a JSON Lines file, or of one that is a JSON list as a whole.

    Raises:
        DataError: a line is too long, or the list is no JSON.
    """
    begun: list[bytes] = []
    source = lines(file, name)
    for line in source:
        begun.append(line)
        if line.removeprefix(_BYTE_ORDER_MARK).strip():
            break
    opening = begun[-1].removeprefix(_BYTE_ORDER_MARK).strip() if begun else b""
    if opening.startswith(b"[") and not _complete(opening):
        yield from json_rows(cast("BinaryIO", _Rejoined(begun, file)), name)
        return
    if opening.startswith(b"["):
        following = next((line for line in source if line.strip()), None)
        if following is None:
            yield from json_rows(io.BytesIO(b"".join(begun)), name)
            return
        begun.append(following)
    yield from jsonl_rows(chain(begun, source))


def _complete(line: bytes) -> bool:
    try:
        json.loads(line)
    except RecursionError:  # nested without end: the fault of this line, not of the file
        return True
    except ValueError:
        return False
    return True


class _Rejoined:
    """A binary file of which some lines were read already."""

    def __init__(self, begun: Sequence[bytes], file: BinaryIO) -> None:
        self._begun = b"".join(begun)
        self._file = file

    def read(self, size: int) -> bytes:
        """The lines that were read already, then what follows in the file."""
        if self._begun:
            begun, self._begun = self._begun, b""
            return begun
        return self._file.read(size)


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
    return _object(values, text, place)
