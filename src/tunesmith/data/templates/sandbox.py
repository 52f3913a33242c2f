"""The Jinja sandbox of chat templates: transformers' `ImmutableSandboxedEnvironment` with limits on
the size of results and on time.

A template comes with a model, so it is untrusted code. The sandbox of transformers keeps it from
files and from Python's internals, but not from making a text of a terabyte or from running for
ever. Here every operation that can make much out of little checks the size of its result first, and
a watchdog thread stops a rendering that takes too much CPU time. What ordinary templates do costs
nothing extra: sums that are written out at once, loops and attributes are not checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from functools import wraps
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any, cast

from jinja2 import Template as JinjaTemplate
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from tunesmith.data.templates.sandbox_limits import (
    WATCHED,
    TooLarge,
    bounded,
    bounded_join,
    bounded_str_join,
    check_filter,
    check_method,
    check_operation,
    clock,
)

LONGEST_TEMPLATE = 1 << 18
"""The largest number of characters of a template itself; the longest published ones have a
tenth.
"""
_CHAIN = 16
"""Sums with more parts than this are checked before their end."""
_MARK = "tunesmith_watched"
_TEXT_FILTERS = (
    *("upper", "lower", "capitalize", "title", "trim", "striptags", "escape", "e", "forceescape"),
    *("urlize", "urlencode", "wordwrap", "truncate", "string", "safe", "reverse", "pprint"),
    *("xmlattr", "replace", "format", "join", "center", "indent", "tojson", "list", "batch"),
    *("slice", "sum", "round", "int"),
)


def _watched_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def watched(*arguments: Any, **named: Any) -> Any:
        return bounded(function(*check_filter(name, arguments, named), **named))

    setattr(watched, _MARK, True)
    return watched


class _Watched(NodeTransformer):
    """Rewrites a template's syntax tree: wraps in `bounded` all that can grow.

    These are sums that are kept, lists of variables, and slices of texts. A sum that is written out
    at once needs no check, since the whole text is checked.
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
        """Visit a sum as one expression, up to `_CHAIN` parts, so that it is checked once and not
        per part.
        """
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
        # Compiled templates join values by these two functions of their own module.
        names = made.root_render_func.__globals__
        names["str_join"] = bounded_str_join
        names["markup_join"] = bounded_str_join
        return made

    def render(self, *args: Any, **kwargs: Any) -> str:
        """The text.

        Raises whatever the template raises.
        """
        clock.enter()
        try:
            return bounded_join(self.root_render_func(self.new_context(dict(*args, **kwargs))))
        finally:
            clock.leave()


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """The sandbox of transformers, with the limits of this module."""

    template_class = BoundedTemplate
    intercepted_binops = frozenset({"*", "**", "%", "//"})
    concat = staticmethod(bounded_join)  # type: ignore[assignment]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The value of an operation, unless it or the work for it would be too large."""
        check_operation(operator, left, right)
        return bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function, method or macro with checked arguments."""
        kind: Any = cast(Any, type(__obj))
        if kind is BuiltinMethodType or kind is MethodType or kind is FunctionType:
            name = __obj.__name__
            if name in WATCHED:
                owner = getattr(__obj, "__wrapped__", __obj)
                args = check_method(getattr(owner, "__self__", ""), name, args, kwargs)
        value = super().call(__context, __obj, *args, **kwargs)
        return value if value is None else bounded(value)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise TemplateSyntaxError(f"it has {len(source):,} characters", 1)
        return super()._parse(source, name, filename)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        filters = cast("dict[str, Any]", self.filters)  # pyright: ignore[reportUnknownMemberType]
        filters["tunesmith_bounded"] = bounded
        for name in _TEXT_FILTERS:
            if not hasattr(filters[name], _MARK):
                filters[name] = _watched_filter(name, filters[name])
        return super()._generate(_Watched().visit(source), *args, **kwargs)


def compile_bounded(text: str) -> Any:
    """Compile a template as transformers does, within the limits.

    Raises:
        TemplateSyntaxError: it is no template, or too large to be parsed.
    """
    from transformers.utils import chat_template_utils

    owner = cast(Any, chat_template_utils)
    clock.enter()
    try:
        with bounded_sandbox():
            compiled = owner._compile_jinja_template(text)
            if not isinstance(compiled.environment, BoundedSandbox):
                # transformers caches compiled templates. This one was compiled outside of these
                # limits, by another user of transformers in this process.
                for function in ("_compile_jinja_template", "_cached_compile_jinja_template"):
                    getattr(getattr(owner, function, None), "cache_clear", int)()
                compiled = owner._compile_jinja_template(text)
    except TemplateSyntaxError:
        raise
    except (SyntaxError, RecursionError, MemoryError, ValueError, ArithmeticError) as error:
        # Python's errors for code that is nested too deeply, or for a number that is too long.
        raise TemplateSyntaxError(f"it can't be read: {type(error).__name__}", 1) from error
    except SecurityError as error:
        raise TemplateSyntaxError(str(error), 1) from error
    finally:
        clock.leave()
    return compiled


@contextlib.contextmanager
def bounded_sandbox() -> Generator[None, None, None]:
    """Inside, transformers compiles templates with the bounded sandbox."""
    from transformers.utils import chat_template_utils

    owner = cast(Any, chat_template_utils)
    usual = owner.ImmutableSandboxedEnvironment
    owner.ImmutableSandboxedEnvironment = BoundedSandbox
    try:
        yield
    finally:
        owner.ImmutableSandboxedEnvironment = usual
