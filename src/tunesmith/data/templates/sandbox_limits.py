"""Size limits of the Jinja sandbox: the size of a result is computed before the result is made.

Each check knows how large the result of one operation, method or filter can become from the sizes
of its arguments; what it can't bound cheaply it refuses.
"""

from __future__ import annotations

import re
from collections.abc import Sized
from typing import Any, cast

from jinja2.exceptions import SecurityError

from tunesmith.data.templates.timeout import TimeLimit

LONGEST_TEXT = 1 << 24
"""The largest number of characters of one text, or of all texts in a list, that a template may
make.
"""
_ALL_TEXTS = 1 << 28
"""The largest number of characters of all long texts of one rendering."""
_LONG = 1 << 16
_WIDEST = 10_000
"""The largest width to which a text may be padded."""
_LARGEST_BITS = 1 << 14
_DEEPEST = 200

_PADDED = frozenset({"ljust", "rjust", "center", "zfill", "to_bytes", "expandtabs"})
WATCHED = _PADDED | {"replace", "join", "format", "format_map", "translate", "from_bytes"}
_WIDE_FILTERS = {
    **dict.fromkeys(("center", "indent", "tojson", "wordwrap", "batch", "slice"), _WIDEST),
    "round": 300,
}
_PERCENT_FIELD = re.compile(r"%(?:\([^)]*\))?[-+ #0-9.]*(?:\*|\d{5})")
_BRACE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(?:\d{5}|\{)")
"""Fields of a format string with a width of five digits, or with a width given by an argument."""

clock = TimeLimit(seconds=5.0)


class TooLarge(SecurityError):
    """A template would make more than the limits allow."""


def _refuse(what: str) -> None:
    raise TooLarge(f"it makes {what}, which is more than a template may make")


def bounded(value: Any) -> Any:
    """The value, unless it is too large.

    Raises:
        TooLarge: its text is too long, or all long texts of this rendering together are.
    """
    kind = cast("Any", type(value))
    if kind is str:
        # Short strings are by far the most frequent values, so they are handled first.
        if len(value) <= _LONG:
            return value
    elif not isinstance(value, (str, bytes, list, tuple, dict)):
        return value
    size = weight(value)
    if size > _LONG:
        bounded_size(size)
        spent = clock.entry
        spent[0] += size
        bounded_size(spent[0], most=_ALL_TEXTS)
    return cast(Any, value)


def bounded_size(size: int, *, most: int = LONGEST_TEXT) -> None:
    """Raises TooLarge for a text of more characters than allowed."""
    if size > most:
        _refuse(f"a text of {size:,} characters")


def weight(value: Any, known: dict[int, int] | None = None, depth: int = 0) -> int:
    """About the number of characters of the value when it is written out; what it contains twice
    counts twice.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 8
    if depth > _DEEPEST:
        _refuse("a list deep in other lists")
    # A list may contain another many times; each is measured once, so the time is linear.
    known = {} if known is None else known
    key = id(cast(Any, value))
    if key not in known:
        items: Any = cast("dict[Any, Any]", value)
        inside = [*items, *items.values()] if isinstance(value, dict) else items
        known[key] = sum(weight(item, known, depth + 1) for item in inside) + 8
    return known[key]


def bounded_join(pieces: Any) -> str:
    """Join texts into one. Raises TooLarge if it is too long."""
    parts = list(pieces)
    size = sum(map(len, parts))
    if size > _LONG:
        bounded_size(size)
        return bounded("".join(parts))
    return "".join(parts)


def bounded_str_join(pieces: Any) -> str:
    """Join values into one text. Raises TooLarge if it is too long."""
    return bounded_join(map(str, pieces))


def _bits(*numbers: Any) -> int:
    return sum(n.bit_length() for n in numbers if isinstance(n, int))


def check_operation(operator: str, left: Any, right: Any) -> None:
    """Raises TooLarge for a product, power, quotient or format that would be too large."""
    if operator == "*":
        for many, times in ((left, right), (right, left)):
            if isinstance(many, str | bytes | list | tuple) and isinstance(times, int):
                bounded_size(weight(many) * max(times, 0))
    if operator == "%" and isinstance(left, str | bytes):
        _check_format(left, right)
    elif operator == "**" and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > _LARGEST_BITS:
            _refuse("a number of too many digits")
    elif _bits(left, right) > _LARGEST_BITS:
        _refuse("a number of too many digits")


def _check_format(form: Any, arguments: Any, *, sign: str = "%") -> None:
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    if (_PERCENT_FIELD if sign == "%" else _BRACE_FIELD).search(text):
        _refuse("a very wide field")
    fields = text.count(sign)
    bounded_size(len(text) + fields * weight(_plain(arguments)))


def _plain(arguments: Any) -> Any:
    return cast(Any, arguments) if isinstance(arguments, list | tuple | dict) else [arguments]


def _check_replace(text: Any, arguments: tuple[Any, ...]) -> None:
    if len(arguments) < 2:
        return
    text, (old, new) = str(text), (str(one) for one in arguments[:2])
    if (len(text) + 1) * len(new) > LONGEST_TEXT:
        bounded_size(len(text) + text.count(old) * len(new))


def _check_join(between: Any, items: Any) -> list[Any]:
    found = list(items)
    bounded_size(weight(found) + len(str(between)) * len(found))
    return found


def check_method(
    owner: Any, name: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """Check the arguments of a method that can make much out of little; returns the arguments to
    use.
    """
    given = (*arguments, *named.values())
    if name in _PADDED:
        if any(isinstance(one, int) and one > _WIDEST for one in given):
            _refuse("a very wide field")
        if name == "expandtabs":
            bounded_size(len(owner) * max([8, *(n for n in given if isinstance(n, int))]))
    elif name == "replace":
        _check_replace(owner, given)
    elif name == "join" and arguments:
        return (_check_join(owner, arguments[0]), *arguments[1:])
    elif name in ("format", "format_map"):
        _check_format(owner, [*arguments, named], sign="{")
    elif name == "translate":
        tables = [cast("dict[Any, Any]", one) for one in given if isinstance(one, dict)]
        longest = max((weight(v) for table in tables for v in table.values()), default=1)
        bounded_size(len(owner) * longest)
    elif name == "from_bytes" and any(isinstance(one, Sized) and len(one) > 64 for one in given):
        _refuse("a number of too many digits")
    return arguments


def check_filter(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """Check the arguments of a filter in the same way. Some filters get the context as first
    argument.
    """
    at = 1 if arguments and hasattr(arguments[0], "autoescape") else 0
    value, given = arguments[at], (*arguments[at + 1 :], *named.values())
    wide = max((one for one in given if isinstance(one, int)), default=0)
    if name in _WIDE_FILTERS and wide > _WIDE_FILTERS[name]:
        _refuse("a very wide field")
    if name == "indent":
        margin = max([wide, *(len(one) for one in given if isinstance(one, str))])
        bounded_size(len(str(value)) + margin * (str(value).count("\n") + 1))
    elif name == "replace":
        _check_replace(value, given)
    elif name == "join" and "attribute" not in named and len(given) < 2:
        items = _check_join(given[0] if given else "", value)
        return (*arguments[:at], items, *arguments[at + 1 :])
    elif name == "format":
        _check_format(value, [*arguments[at + 1 :], named])
    elif name == "int" and isinstance(value, str) and len(value) > 4096:
        _refuse("a number of too many digits")
    elif name == "sum" and any(not isinstance(one, int | float | str) for one in given):
        _refuse("a sum of lists")
    elif name == "xmlattr":
        bounded_size(6 * weight(value))
    return arguments
