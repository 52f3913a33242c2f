"""Detection of chat templates that write today's date, which would give a row other ids each day.

The template is rendered at two mocked moments; a difference means that it writes the date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError

from tunesmith.data.templates.fast_render import compile_template
from tunesmith.data.templates.timeout import TooSlow
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.templates.template import Template

_CLOCK = "strftime_now"
_FORM = "%d %b %Y"
_DAYS = (datetime(2001, 2, 3, 4, 5), datetime(2019, 11, 27, 18, 46))
"""Two moments that differ in every part that a date format can contain."""


def check_dates(template: Template) -> None:
    """Refuse a template that writes today's date, unless its arguments fix the date."""
    if not template.has_chat_template:
        return
    texts = template.jinja or template.tokenizer.chat_template
    arguments = {**template.tokenizer.special_tokens_map, **template.kwargs}
    for jinja in [texts] if isinstance(texts, str) else dict(texts).values():
        if _CLOCK in jinja:
            _check(jinja, arguments)


def _check(jinja: str, arguments: Mapping[str, Any]) -> None:
    form = _dated(jinja, arguments)
    if form is None:
        return
    for name in _names(jinja):
        if name not in arguments and _dated(jinja, {**arguments, name: "1 Jan"}) is None:
            today = datetime.now().strftime(form)
            hint = f"say which date it writes: data.template_kwargs='{{{name}: {today}}}'"
            break
    else:
        hint = (
            "write the template to a file with a date in the place of "
            f"{_CLOCK}(...), and give data.template=FILE.jinja"
        )
    raise DataError(
        "the chat template writes today's date, so the ids of a row would change from day to day",
        where="data.template",
        hint=hint,
    )


def _dated(jinja: str, arguments: Mapping[str, Any]) -> str | None:
    """The date format that the template uses; None if no text depends on the date."""
    asked: list[str] = []

    def clock(day: datetime) -> Callable[[str], str]:
        def now(form: str) -> str:
            asked.append(form)
            return day.strftime(form)

        return now

    try:
        compiled = compile_template(jinja)
    except TemplateSyntaxError:
        return None  # each row is refused later, with the reason
    for probe in _probes():
        texts: set[str] = set()
        for day in _DAYS:
            try:
                texts.add(compiled.render(**{**probe, **arguments, _CLOCK: clock(day)}))
            except TooSlow:
                raise
            except Exception:
                # A template is untrusted code. One that refuses a conversation writes no date in
                # it.
                texts.add("")
        if len(texts) > 1:
            return asked[0] if asked else _FORM
    return None


def _names(jinja: str) -> list[str]:
    """Template variables whose names contain `date`, the shortest names first."""
    from jinja2 import meta

    environment = compile_template(jinja).environment
    names = meta.find_undeclared_variables(environment.parse(jinja))
    return sorted((name for name in names if "date" in name.lower()), key=lambda n: (len(n), n))


def _probes() -> Iterator[dict[str, Any]]:
    """Conversations that cover a template's different ways to begin."""
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    answer = {"role": "assistant", "content": "A"}
    tool = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
    for tools in (None, [{"type": "function", "function": tool}]):
        for messages in ([user], [system, user], [user, answer], [system, user, answer]):
            yield {
                "messages": messages,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": len(messages) % 2 == 1,
            }
