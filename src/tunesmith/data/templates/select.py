"""Selection of the chat template (Jinja, as transformers' `apply_chat_template`), and the special
tokens that it needs and the tokenizer lacks; with ChatML, the built-in template for base models.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tunesmith.data.templates.sandbox import bounded_sandbox
from tunesmith.data.templates.timeout import TooSlow
from tunesmith.errors import DataError, InputError

NONE, CHATML = "none", "chatml"
BUILT_IN = (NONE, CHATML)
"""Names that are never read as a file, whatever files there are."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_NAME = re.compile(r"[\w-][\w.-]*")
_HINT = "give a .jinja file, a folder or hub id of a model with a chat template, chatml or none"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")

Load = Callable[[str], Any]
"""Loads a tokenizer by folder or hub id."""


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token that was added to the tokenizer for its template, with the settings of an
    `AddedToken`.
    """

    id: int
    text: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    single_word: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen chat template: its text (None if there are several or none), its name, and if
    there is one.

    `needs` are tokens that the text can't do without (objects with the fields of `NewToken` but its
    id). `named` gives bos_token and the like where the template reads one that may be missing.
    """

    jinja: str | None
    name: str
    has_one: bool
    needs: tuple[Any, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict[str, str])


def choose(tokenizer: Any, asked: str | None, *, load: Load, check: Callable[..., None]) -> Choice:
    """Choose the template for a tokenizer.

    `asked` is None for the tokenizer's own template, `none` for raw text, `chatml` for the built-in
    one, the path of a Jinja file, or the folder or hub id of another model, whose template is
    taken. `check` refuses a text that is no template.

    Raises:
        DataError: there is no such file or model, or it has no chat template.
    """
    if asked == NONE:
        return Choice(None, NONE, False)
    if asked is None:
        jinja = tokenizer.chat_template
        _check_names(jinja)
        name = "own" if jinja else NONE
        return Choice(jinja if isinstance(jinja, str) else None, name, bool(jinja))
    if asked == CHATML:
        return Choice(CHATML_TEMPLATE, CHATML, True, tuple(map(_plain, CHATML_TOKENS)))
    path = Path(asked).expanduser()
    if path.is_dir() or (not path.exists() and _is_hub_id(asked)):
        return _another(asked, path, load)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"the chat template can't be read: {reason}",
            where=f"data.template={asked}",
            hint=_HINT,
        ) from error
    check(text, path)
    return Choice(text, asked, True)


def _check_names(templates: Any) -> None:
    """Refuse names of templates that are no file names, since each template is saved to a file of
    its name.
    """
    if isinstance(templates, Mapping):
        for name in cast("Mapping[str, Any]", templates):
            if not _FILE_NAME.fullmatch(name):
                raise DataError(
                    f"the model has a chat template named {name!r}, which can't be a file name",
                    where="data.template",
                    hint=_HINT,
                )


def with_tokens(tokenizer: Any, choice: Choice) -> tuple[Any, tuple[NewToken, ...], dict[str, str]]:
    """Add the tokens that the template needs; returns (tokenizer, tokens it lacked, names it
    lacked).

    Where something is added, the tokenizer is a copy. A token that is in the vocabulary keeps its
    id; the others follow the last id.
    """
    named = {
        name: text for name, text in choice.named.items() if getattr(tokenizer, name, None) is None
    }
    known = {str(entry.content) for entry in tokenizer.added_tokens_decoder.values()}
    texts = {str(token.content) for token in choice.needs}
    needs = [
        *choice.needs,
        *(_plain(text) for text in dict.fromkeys(named.values()) if text not in texts),
    ]
    missing = [token for token in needs if str(token.content) not in known]
    if not missing and not named:
        return tokenizer, (), {}
    # The caller's tokenizer must not change.
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens(missing, special_tokens=True)
    for name, text in named.items():
        setattr(grown, name, text)
    ids: list[int] = [int(grown.convert_tokens_to_ids(str(token.content))) for token in missing]
    added = [
        NewToken(
            number,
            str(token.content),
            bool(token.special),
            bool(token.lstrip),
            bool(token.rstrip),
            bool(token.normalized),
            bool(token.single_word),
        )
        for number, token in sorted(zip(ids, missing, strict=True), key=lambda pair: pair[0])
    ]
    return grown, tuple(added), named


def _plain(text: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(text, special=True, normalized=False)


def _is_hub_id(name: str) -> bool:
    file = name.endswith((".jinja", ".jinja2", ".j2", ".txt")) or Path(name).parent.is_dir()
    return _HUB_ID.fullmatch(name) is not None and not file


def _another(asked: str, path: Path, load: Load) -> Choice:
    """The template of another model's tokenizer, and the special tokens that it writes."""
    where = f"data.template={asked}"
    try:
        tokenizer = load(str(_model_folder(path)) if path.is_dir() else asked)
    except InputError as error:
        raise DataError(error.message, where=where, hint=_HINT) from error
    jinja = tokenizer.chat_template
    if isinstance(jinja, Mapping):
        jinja = jinja.get("default")  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if not isinstance(jinja, str):
        raise DataError("this model has no chat template", where=where, hint=_HINT)
    named = {
        name: str(text)
        for name in _NAMED
        if name in jinja and (text := getattr(tokenizer, name, None)) is not None
    }
    written = _written(tokenizer, jinja)
    needs = [
        token
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
        and token.content.strip()
        and (
            token.content in jinja
            or (token.content in written and token.content not in named.values())
        )
    ]
    return Choice(jinja, asked, True, tuple(needs), named)


def _model_folder(path: Path) -> Path:
    """The model folder of a run folder; any other path as it is."""
    inside = path / "model"
    return inside if (path / "recipe.yaml").is_file() and inside.is_dir() else path


def _written(tokenizer: Any, jinja: str) -> set[str]:
    """The special tokens in the texts of some conversations; templates may assemble their names
    from parts, so the template's text does not show all.
    """
    found: set[str] = set()
    added = tokenizer.added_tokens_decoder
    for messages, tools in _conversations():
        for asked in (False, True):
            try:
                with bounded_sandbox():
                    text = tokenizer.apply_chat_template(
                        messages,
                        tools=tools,
                        chat_template=jinja,
                        add_generation_prompt=asked,
                        tokenize=False,
                    )
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            except TooSlow:
                raise
            except Exception:
                # A template is untrusted code. One that refuses a conversation needs no token for
                # it.
                continue
            found.update(str(added[number].content) for number in set(ids) & set(added))
    return found


def _conversations() -> Iterable[tuple[list[dict[str, Any]], list[dict[str, Any]] | None]]:
    schema = {"name": "find", "description": "Finds.", "parameters": {"type": "object"}}
    call = {"type": "function", "function": {"name": "find", "arguments": {"at": "x"}}}
    system, user = {"role": "system", "content": "S"}, {"role": "user", "content": "U"}
    answer = {"role": "assistant", "content": "A"}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "name": "find", "content": "R"}
    tools = [{"type": "function", "function": schema}]
    yield [user, answer], None
    yield [system, user, answer], None
    yield [user, {**answer, "reasoning_content": "T"}], None
    yield [user, calling, result, answer], tools


CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
CHATML_TEMPLATE = r"""
{%- set first = namespace(at=0) %}
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages and messages[0].role == 'system' %}
        {%- set first.at = 1 %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- 'These functions can be called:\n<tools>\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\n' }}
    {%- endfor %}
    {{- '</tools>\nA call is written as\n<tool_call>\n' }}
    {{- '{"name": NAME, "arguments": {...}}\n</tool_call><|im_end|>\n' }}
{%- endif %}
{%- for message in messages[first.at:] %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\n' + message.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {%- set function = call.function or call %}
        {{- '\n' if message.content or not loop.first else '' }}
        {{- '<tool_call>\n{"name": ' + function.name | tojson + ', "arguments": ' }}
        {%- if function.arguments is string %}
            {{- function.arguments }}
        {%- else %}
            {{- function.arguments | tojson }}
        {%- endif %}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""".strip()
"""It renders every earlier turn unchanged, so the documents of a chat never branch. Tool calls and
reasoning are written in Qwen's format.
"""
