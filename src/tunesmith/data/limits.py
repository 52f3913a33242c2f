"""What a chat template may use: a sandbox whose texts, numbers and time are bounded.

A template comes with a model, so it is foreign code. The sandbox of transformers keeps it from
files and from Python's insides; it does not keep it from making a text of a terabyte or from going
on for ever. Here every operation by which a template could make much out of little looks at its
size first, and a thread ends a text that takes too much processor time. What no template of a chat
does costs nothing: sums that are written out at once, loops and attributes are as they were.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sized
from functools import wraps
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, cast

from jinja2 import Template as JinjaTemplate
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tunesmith.data.clock import Clock

LONGEST_TEMPLATE = 1 << 18
"""Characters of a template's own text; the longest published ones have a tenth."""
LONGEST_TEXT = 1 << 24
"""Characters of a text, or of all texts in a list, that a template may make."""
_ALL_TEXTS = 1 << 28
"""Characters of all long texts that it may make in one call."""
_LONG = 1 << 16
_WIDEST = 10_000
"""Columns to which it may pad a text."""
_LARGEST_BITS = 1 << 14
_DEEPEST = 200
_CHAIN = 16
"""Sums of more parts are looked at before their end."""

_PADDED = frozenset({"ljust", "rjust", "center", "zfill", "to_bytes", "expandtabs"})
_WATCHED = _PADDED | {"replace", "join", "format", "format_map", "translate", "from_bytes"}
_TEXT_FILTERS = (
    *("upper", "lower", "capitalize", "title", "trim", "striptags", "escape", "e", "forceescape"),
    *("urlize", "urlencode", "wordwrap", "truncate", "string", "safe", "reverse", "pprint"),
    *("xmlattr", "replace", "format", "join", "center", "indent", "tojson", "list", "batch"),
    *("slice", "sum", "round", "int"),
)
_WIDE_FILTERS = {
    **dict.fromkeys(("center", "indent", "tojson", "wordwrap", "batch", "slice"), _WIDEST),
    "round": 300,
}
_FIELD = re.compile(r"\d{5}|\*|:[^{}]*\{")
"""In a format: a width of five digits, or one that an argument gives."""

clock = Clock(seconds=5.0)


class TooLarge(SecurityError):
    """A template asked for more than it may have."""


def _refuse(what: str) -> None:
    raise TooLarge(f"it makes {what}, more than a template may")


def bounded(value: Any) -> Any:
    """The value, if its text is not too long.

    Raises:
        TooLarge: it is, or the long texts of this call are together.
    """
    kind = cast("Any", type(value))
    if kind is str:
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
    """Characters that the value takes when it is written out, about; what it holds twice counts
    twice.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 8
    if depth > _DEEPEST:
        _refuse("a list deep in other lists")
    known = {} if known is None else known
    key = id(cast(Any, value))
    if key not in known:
        items: Any = cast("dict[Any, Any]", value)
        inside = [*items, *items.values()] if isinstance(value, dict) else items
        known[key] = sum(weight(item, known, depth + 1) for item in inside) + 8
    return known[key]


def _join(pieces: Any) -> str:
    parts = list(pieces)
    size = sum(map(len, parts))
    if size > _LONG:
        bounded_size(size)
        return bounded("".join(parts))
    return "".join(parts)


def _str_join(pieces: Any) -> str:
    return _join(map(str, pieces))


def _bits(*numbers: Any) -> int:
    return sum(n.bit_length() for n in numbers if isinstance(n, int))


def _check_operation(operator: str, left: Any, right: Any) -> None:
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


def _check_format(form: Any, arguments: Any) -> None:
    text = form.decode("latin-1") if isinstance(form, bytes) else str(form)
    if _FIELD.search(text):
        _refuse("a very wide field")
    fields = text.count("%") + text.count("{")
    bounded_size(len(text) + fields * weight(_plain(arguments)))


def _plain(arguments: Any) -> Any:
    return arguments if isinstance(arguments, list | tuple | dict) else [arguments]


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


def _check_method(
    owner: Any, name: str, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a method that can make much out of little, if it does not."""
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
        _check_format(owner, [*arguments, named])
    elif name == "translate":
        tables = [cast("dict[Any, Any]", one) for one in given if isinstance(one, dict)]
        longest = max((weight(v) for table in tables for v in table.values()), default=1)
        bounded_size(len(owner) * longest)
    elif name == "from_bytes" and any(isinstance(one, Sized) and len(one) > 64 for one in given):
        _refuse("a number of too many digits")
    return arguments


def _check_filter(name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a filter, looked at in the same way. Some filters have the context first."""
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


def _watched_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        return bounded(function(*_check_filter(name, arguments, named), **named))

    watched.tunesmith_watched = True  # pyright: ignore[reportFunctionMemberAccess]
    return watched


class _Watched(NodeTransformer):
    """Puts `bounded` around what can grow: sums that are kept, lists of variables, parts of texts.

    A sum that is written out at once is counted with the whole text.
    """

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        for number, one in enumerate(node.nodes):
            free = isinstance(one, nodes.Add) and _parts(one) <= _CHAIN
            visited: Any = self._inside(one) if free else self.visit(one)
            node.nodes[number] = visited
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        return _wrap(self._inside(node))

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._holder(node)

    visit_Dict = visit_List  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self.generic_visit(node) if node.ctx != "load" else self._holder(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        found = self.generic_visit(node)
        return _wrap(found) if isinstance(node.arg, nodes.Slice) else found

    def visit_Block(self, node: nodes.Block) -> nodes.Node:  # noqa: N802
        raise TooLarge(f"it has a block, {node.name}, which no chat template needs")

    def _holder(self, node: Any) -> nodes.Node:
        variable = next(node.find_all((nodes.Name, nodes.Call, nodes.Filter)), None)
        found = self.generic_visit(node)
        return found if variable is None else _wrap(found)

    def _inside(self, node: nodes.Node) -> nodes.Node:
        """A sum whose first parts, up to `_CHAIN` of them, are taken together with it."""
        at: Any = node
        for _ in range(_CHAIN):
            at.right = self.visit(at.right)
            if not isinstance(at.left, nodes.Add):
                break
            at = at.left
        at.left = self.visit(at.left)
        return node


def _parts(node: Any) -> int:
    count = 1
    while isinstance(node, nodes.Add) and count <= _CHAIN + 1:
        node, count = node.left, count + 1
    return count


def _wrap(node: Any) -> nodes.Node:
    place = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Filter(node, "tunesmith_bounded", [], [], None, None, **place)


class BoundedTemplate(JinjaTemplate):
    """A compiled template that renders within the limits."""

    @classmethod
    def from_code(cls, environment: Any, code: Any, globals: Any, uptodate: Any = None) -> Any:
        made: Any = super().from_code(environment, code, globals, uptodate)
        names = cast(Any, made.root_render_func).__globals__
        names["str_join"] = _str_join
        names["markup_join"] = _str_join
        return made

    def render(self, *args: Any, **kwargs: Any) -> str:
        """The text.

        Raises whatever the template raises.
        """
        clock.enter()
        try:
            return _join(self.root_render_func(self.new_context(dict(*args, **kwargs))))
        finally:
            clock.leave()


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with the limits of this module."""

    template_class = BoundedTemplate
    intercepted_binops = frozenset({"*", "**", "%", "//"})
    concat = staticmethod(_join)  # type: ignore[assignment]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The operation's value, if neither it nor the work for it is too large."""
        _check_operation(operator, left, right)
        return bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro."""
        kind: Any = type(__obj)
        if kind is BuiltinMethodType or kind is MethodType or kind is FunctionType:
            name = __obj.__name__
            if name in _WATCHED:
                owner = getattr(__obj, "__wrapped__", __obj)
                args = _check_method(getattr(owner, "__self__", ""), name, args, kwargs)
        value = super().call(__context, __obj, *args, **kwargs)
        return value if value is None else bounded(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateSyntaxError(f"it has {len(source):,} characters", 1)
        return super()._parse(source, name, filename)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        self.filters["tunesmith_bounded"] = bounded
        for name in _TEXT_FILTERS:
            function = self.filters[name]
            if not hasattr(function, "tunesmith_watched"):
                self.filters[name] = _watched_filter(name, function)
        return super()._generate(_Watched().visit(source), *args, **kwargs)


def compile_bounded(text: str) -> Any:
    """The template as transformers compiles it, within the limits.

    Raises:
        TemplateSyntaxError: it is none, or too large to be read.
    """
    from transformers.utils import chat_template_utils

    owner = cast(Any, chat_template_utils)
    clock.enter()
    try:
        with bounded_sandbox():
            compiled = owner._compile_jinja_template(text)
            if not isinstance(compiled.environment, BoundedSandbox):
                # Kept from before, when somebody else in this process used the same template.
                for function in ("_compile_jinja_template", "_cached_compile_jinja_template"):
                    getattr(getattr(owner, function, None), "cache_clear", int)()
                compiled = owner._compile_jinja_template(text)
    except TemplateSyntaxError:
        raise
    except (SyntaxError, RecursionError, MemoryError, ValueError, ArithmeticError) as error:
        # What Python says of code that is nested too deep, or of a number too long to read.
        raise TemplateSyntaxError(f"it can't be read: {type(error).__name__}", 1) from error
    except SecurityError as error:
        raise TemplateSyntaxError(str(error), 1) from error
    finally:
        clock.leave()
    return compiled


@contextlib.contextmanager
def bounded_sandbox() -> Iterator[None]:
    """Inside, what transformers compiles is compiled within the limits."""
    from transformers.utils import chat_template_utils

    owner = cast(Any, chat_template_utils)
    usual = owner.ImmutableSandboxedEnvironment
    owner.ImmutableSandboxedEnvironment = BoundedSandbox
    try:
        yield
    finally:
        owner.ImmutableSandboxedEnvironment = usual
