"""Fast rendering of a compiled Jinja chat template: transformers' `apply_chat_template` without the
copies that it makes at each call.

It is used only where probe conversations give the same text as `apply_chat_template`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

from tunesmith.data.templates.sandbox import compile_bounded
from tunesmith.data.templates.timeout import TooSlow

CAPTURE = "{{ tunesmith_take(messages, tools) }}"
"""A template that captures messages and tools as transformers passes them to a template."""

_REASONING = {"reasoning_content", "reasoning", "thinking"}
_SCALARS = (str, bool, int, float)
_KEPT = 1024
_VALUES = frozenset({str, int, bool, float, list, dict, type(None)})
_OF_DICTS = frozenset(dir(dict))
_OF_STRINGS = frozenset({"startswith", "endswith", "strip", "lstrip", "rstrip", "split", "replace"})

Messages = Sequence[Mapping[str, Any]]
Apply = Callable[..., str]


class Memo:
    """Cached facts about a template; they are not pickled, so a worker process computes them
    anew.
    """

    def __init__(self) -> None:
        self.texts: dict[tuple[int, ...], str] = {}
        self.direct: DirectTemplate | None = None
        self.tried = False
        self.turn_pattern: Any = None
        self.reads: dict[tuple[Any, ...], bool] = {}  # fields of messages, by kind of message

    def __reduce__(self) -> tuple[type[Memo], tuple[()]]:
        return Memo, ()


def find_direct(tokenizer: Any, jinja: str | None, *, apply: Apply) -> DirectTemplate | None:
    """The template as a direct call; None where its texts differ from those of transformers."""
    from transformers import PreTrainedTokenizerBase

    kind = cast("Any", type(tokenizer))
    usual: Any = PreTrainedTokenizerBase
    if getattr(kind, "apply_chat_template", None) is not usual.apply_chat_template:
        return None
    if jinja is None or not isinstance(tokenizer.chat_template, str | None):
        return None
    try:
        found = DirectTemplate(jinja, apply=apply, tokens=tokenizer.special_tokens_map)
        return found if found.agrees() else None
    except TooSlow:
        raise
    except Exception:
        # Versions of transformers compile differently; `apply_chat_template` works with all of
        # them.
        return None


def compile_template(text: str) -> Any:
    """Compile a template as transformers does, in the bounded sandbox. Raises
    TemplateSyntaxError.
    """
    return compile_bounded(text)


class DirectTemplate:
    """Renders a chat template with the same text as `apply`, which calls transformers.

    transformers copies and normalises messages, tools and arguments at each call. Here messages of
    plain strings are passed as they are. Other messages, and tools, are normalised by transformers
    once (captured by `CAPTURE`) and kept while their row is being rendered.
    """

    def __init__(self, text: str, *, apply: Apply, tokens: Mapping[str, str]) -> None:
        self._compiled = _quickened(text)
        self._apply = apply
        self._tokens = dict(tokens)
        self._plain: dict[int, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
        self._tools: tuple[Any, Any] = (None, None)
        self._taken: list[tuple[Any, Any]] = []

    def render(
        self,
        messages: Messages,
        *,
        tools: Any,
        add_generation_prompt: bool,
        kwargs: Mapping[str, Any],
    ) -> str | None:
        """The rendered text; None if the arguments are of a kind that transformers must normalise.

        Raises whatever the template raises.
        """
        if any(type(value) not in _SCALARS for value in kwargs.values()):
            return None
        return self._compiled.render(
            messages=self._normal(messages),
            tools=self._normal_tools(tools) if tools else None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**self._tokens, **kwargs},
        )

    def agrees(self) -> bool:
        """True if the probe conversations give the same text, or the same refusal, here and by
        `apply`.
        """
        return all(
            self._outcome(self._render_probe, probe) == self._outcome(self._apply_probe, probe)
            for probe in _probes()
        )

    def _normal(self, messages: Messages) -> list[Mapping[str, Any]]:
        if len(self._plain) > _KEPT:
            self._plain.clear()  # before the look-up, since what it finds must stay until the end
        plain = [m if _is_plain(m) else self._known(m) for m in messages]
        if any(one is None for one in plain):
            missing = [m for m, one in zip(messages, plain, strict=True) if one is None]
            found, _ = self._capture(missing, None)
            for message, normal in zip(missing, found, strict=True):
                self._plain[id(message)] = (message, normal)
            return [m if _is_plain(m) else self._plain[id(m)][1] for m in messages]
        return cast("list[Mapping[str, Any]]", plain)

    def _known(self, message: Mapping[str, Any]) -> Mapping[str, Any] | None:
        entry = self._plain.get(id(message))
        return None if entry is None else entry[1]

    def _normal_tools(self, tools: Any) -> Any:
        if self._tools[0] is not tools:
            self._tools = (tools, self._capture([], tools)[1])
        return self._tools[1]

    def _capture(self, messages: Messages, tools: Any) -> tuple[Any, Any]:
        self._taken.clear()
        # transformers caches compiled templates by text, so this global must be set again each
        # time.
        compile_template(CAPTURE).globals["tunesmith_take"] = self._take
        self._apply(messages, tools=tools, chat_template=CAPTURE)
        return self._taken.pop()

    def _take(self, messages: Any, tools: Any) -> str:
        self._taken.append((messages, tools))
        return ""

    def _render_probe(self, probe: Mapping[str, Any]) -> str | None:
        return self.render(**probe, kwargs={})

    def _apply_probe(self, probe: Mapping[str, Any]) -> str:
        return self._apply(**probe)

    @staticmethod
    def _outcome(render: Callable[[Any], str | None], probe: Mapping[str, Any]) -> str | None:
        try:
            return render(probe)
        except TooSlow:
            raise
        except Exception as error:
            # A template is untrusted code: any exception is a refusal, which must be the same in
            # both ways.
            return f"{type(error).__name__}: {error}"


def _quickened(text: str) -> Any:
    """The template with a fast path for attributes that the sandbox always allows.

    A template reads hundreds of attributes per text. Nearly all are items of dicts, its own
    variables or methods that read a string. All other attributes still go through the sandbox's
    checks.
    """
    environment = compile_template(text).environment.overlay()
    checked = environment.getattr

    def read(obj: Any, attribute: str) -> Any:
        kind = cast("Any", type(obj))
        if kind is dict:
            # Jinja prefers the attribute to the item, so a key that is also a method of dict is
            # left to it.
            if attribute in obj and attribute not in _OF_DICTS:
                return obj[attribute]
        elif kind is str:
            if attribute in _OF_STRINGS:
                return getattr(obj, attribute)
        elif (kind is LoopContext or issubclass(kind, Namespace)) and attribute[:1] != "_":
            value = getattr(obj, attribute, None)
            if type(value) in _VALUES:
                return value
        return checked(obj, attribute)

    environment.getattr = read
    made = environment.from_string(text)
    # Jinja keeps a chain of dicts, which is slow to copy for each text.
    made.globals = dict(made.globals)
    return made


def _is_plain(message: Mapping[str, Any]) -> bool:
    """True if transformers passes the message to a template unchanged."""
    return all(type(value) is str for value in message.values()) and _REASONING.isdisjoint(message)


def _probes() -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "find", "arguments": {"at": [1, None, "x"]}}}
    schema = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Short."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "content": "[1]", "name": "find"},
        {"role": "assistant", "content": "There."},
    ]
    plain = [turns[0], turns[1], turns[4]]
    chosen: list[tuple[list[dict[str, Any]], Any]] = [
        (plain, None),
        (plain[1:], None),
        (turns[:2], [{"type": "function", "function": schema}]),
        (turns, [{"type": "function", "function": schema}]),
        ([*turns[:2], {**turns[4], "thinking": "Hm."}], None),
        ([], None),
    ]
    return [
        {"messages": messages, "tools": tools, "add_generation_prompt": asked}
        for messages, tools in chosen
        for asked in (False, True)
    ]
