"""The tokenizer, its chat template and stop tokens; the only data module with transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.templates.date_check import check_dates
from tunesmith.data.templates.fast_render import Memo, compile_template, find_direct
from tunesmith.data.templates.sandbox import bounded_sandbox
from tunesmith.data.templates.select import NewToken, choose, with_tokens
from tunesmith.data.templates.stop_tokens import closing_tokens
from tunesmith.data.templates.timeout import TooSlow
from tunesmith.errors import DataError, ModelError, first_line

_UNBOUNDED = 10**9
"""Tokenizers without a limit name a number far above this one."""

_SHORT = 8
"""Runs of ids up to this long are decoded once: ends of turns, single tokens."""
_TEXTS_KEPT = 4096
_REASON = 500  # characters


@dataclass(frozen=True, slots=True)
class Template:
    """What turns messages into text, text into ids, and says which ids end an answer.

    `jinja` is the chat template's text where one was chosen or the tokenizer has exactly one; None
    without a chat template. `kwargs` are given to every rendering. `added` are tokens that the
    model's own tokenizer lacks, `named` its names (bos_token, ...) that it lacked.
    """

    tokenizer: Any
    name: str
    jinja: str | None
    has_chat_template: bool
    stop_ids: frozenset[int]
    special_ids: frozenset[int]
    special_texts: tuple[str, ...]  # longest first
    bos_id: int | None
    eos_id: int | None
    context_length: int | None
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    added: tuple[NewToken, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict[str, str])
    memo: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)

    @property
    def sha256(self) -> str:
        """Hash in hex of the chat template's text and arguments, which all ids depend on."""
        text = (self.jinja or self.tokenizer.chat_template) if self.has_chat_template else None
        key = json.dumps([text, dict(self.kwargs)], sort_keys=True, default=str)
        return hashlib.sha256(key.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of the messages.

        Raises:
            RowError: there is no chat template, or it refuses these messages.
        """
        if not self.has_chat_template:
            raise RowError(_no_chat_template())
        arguments = {**self.kwargs, **(kwargs or {})}
        if not self.memo.tried:
            self.memo.tried = True
            self.memo.direct = find_direct(self.tokenizer, self.jinja, apply=self._apply)
        try:
            if self.memo.direct is not None:
                text = self.memo.direct.render(
                    messages,
                    tools=tools,
                    add_generation_prompt=add_generation_prompt,
                    kwargs=arguments,
                )
                if text is not None:
                    return text
            return self._apply(
                messages, tools=tools, add_generation_prompt=add_generation_prompt, **arguments
            )
        except TooSlow:
            raise
        except Exception as error:
            # A template is foreign code: whatever it raises means that it can't take this row.
            raise RowError(_refusal(error)) from error

    def _apply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        **arguments: Any,
    ) -> str:
        # As a batch of one, since an empty conversation is read only there.
        with bounded_sandbox():
            texts = self.tokenizer.apply_chat_template(
                [list(messages)],
                tools=list(tools) if tools else None,
                chat_template=chat_template or self.jinja,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **arguments,
            )
        return str(texts[0])

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Ids of each text, in one call; special tokens are added if asked, BOS never twice."""
        if not texts:
            return []
        rows = self.tokenizer(
            list(texts),
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        if add_special_tokens and self.bos_id is not None:
            rows = [ids[1:] if ids[:2] == [self.bos_id] * 2 else ids for ids in rows]
        return cast("list[list[int]]", rows)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens written out."""
        key = tuple(int(token) for token in ids)
        text = self.memo.texts.get(key)
        if text is None:
            text = str(
                self.tokenizer.decode(
                    list(key), skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
            if len(key) <= _SHORT and len(self.memo.texts) < _TEXTS_KEPT:
                self.memo.texts[key] = text
        return text

    def token_text(self, token: int) -> str:
        """The text of one token."""
        return self.decode([token])

    def save(self, folder: Path) -> None:
        """Write the tokenizer and the chat template in use to a folder."""
        self.tokenizer.save_pretrained(folder)
        if self.jinja is not None:
            (folder / "chat_template.jinja").write_text(self.jinja, encoding="utf-8")


def load_template(
    model_folder: Path | str,
    *,
    template: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    dated: bool = False,
) -> Template:
    """The template of a model's folder; reads tokenizer, config and generation config, no weights.

    `template`: None for the model's own, "none" for raw text, "chatml" for the built-in one, the
    path of a Jinja file, or the folder or hub id of another model, whose template is taken.
    `dated` allows one that writes today's date, where nothing is learned from its texts.

    Raises:
        ModelError: the folder has no tokenizer that can be read.
        DataError: the Jinja file is missing or not a template, the other model has none, or the
            template writes today's date.
    """
    folder = Path(model_folder)
    tokenizer = _load_tokenizer(str(folder), trust_remote_code)
    config = _read_json(folder / "config.json")
    text_config = config.get("text_config")
    inner: dict[str, Any] = cast("dict[str, Any]", text_config) if text_config else config
    context = inner.get("max_position_embeddings") or config.get("max_position_embeddings")
    generation = _read_json(folder / "generation_config.json")
    made = _make(
        tokenizer,
        template=template,
        kwargs=kwargs,
        stops=_id_list(generation.get("eos_token_id")) or _id_list(inner.get("eos_token_id")),
        context=context if isinstance(context, int) else None,
    )
    if not dated:
        check_dates(made)
    return made


def wrap_tokenizer(
    tokenizer: Any,
    *,
    template: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dated: bool = False,
) -> Template:
    """The template of a tokenizer that is already loaded and stays as it is.

    Raises:
        DataError: as `load_template`.
    """
    made = _make(tokenizer, template=template, kwargs=kwargs, stops=[], context=None)
    if not dated:
        check_dates(made)
    return made


def _load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    load = cast("Any", AutoTokenizer.from_pretrained)  # pyright: ignore[reportUnknownMemberType]
    try:
        return load(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Tokenizer readers raise whatever their format's parser does.
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ModelError(
                "its tokenizer needs Python code of its own folder",
                where=name,
                hint="read it, then set model.trust_remote_code=true",
            ) from error
        raise ModelError(
            f"its tokenizer can't be read: {reason}",
            where=name,
            hint="the folder must hold tokenizer.json and tokenizer_config.json",
        ) from error


def _make(
    tokenizer: Any,
    *,
    template: str | None,
    kwargs: Mapping[str, Any] | None,
    stops: list[int],
    context: int | None,
) -> Template:
    choice = choose(tokenizer, template, load=_load_tokenizer, check=_check_syntax)
    tokenizer, new, named = with_tokens(tokenizer, choice)
    added: dict[int, Any] = dict(tokenizer.added_tokens_decoder)
    special = {token for token, entry in added.items() if entry.special}
    special |= {int(token) for token in tokenizer.all_special_ids}
    eos, limit = tokenizer.eos_token_id, tokenizer.model_max_length
    if context is None and limit is not None and 0 < limit < _UNBOUNDED:
        context = int(limit)
    stop_ids = {*stops, *([] if eos is None else [int(eos)])}

    def build(stop_ids: set[int]) -> Template:
        texts = {str(text) for text in tokenizer.convert_ids_to_tokens(sorted(special | stop_ids))}
        return Template(
            tokenizer=tokenizer,
            name=choice.name,
            jinja=choice.jinja,
            has_chat_template=choice.has_one,
            stop_ids=frozenset(stop_ids),
            special_ids=frozenset(special),
            special_texts=tuple(sorted(texts, key=lambda text: (-len(text), text))),
            bos_id=tokenizer.bos_token_id,
            eos_id=eos,
            context_length=context,
            kwargs=dict(kwargs or {}),
            added=new,
            named=named,
        )

    built = build(stop_ids)
    if not choice.has_one:
        return built
    closing = closing_tokens(built, {*added, *special})
    return build({*stop_ids, *closing}) if closing else built


def _check_syntax(text: str, path: Path) -> None:
    from jinja2 import TemplateSyntaxError

    try:
        compile_template(text)
    except TemplateSyntaxError as error:
        raise DataError(
            f"not a Jinja template: {error.message}",
            where=f"{path}:{error.lineno}",
            hint="mend the file, or leave data.template out for the model's own template",
        ) from error


def _refusal(error: Exception) -> Fault:
    reason = first_line(error)[:_REASON]
    return Fault(
        "template-refused",
        f"the chat template can't render this row: {reason}",
        "change the row, or choose another template: data.template=FILE.jinja",
    )


def _no_chat_template() -> Fault:
    return Fault(
        "no-chat-template",
        "the row is a chat, but there is no chat template",
        "data.template=chatml is a built-in one for base models; or data.template=FILE.jinja, "
        "another model's folder or hub id, or string prompt and completion with "
        "data.template=none",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        hint = "the file is damaged; get the model anew"
        raise ModelError(f"can't be read: {error}", where=str(path), hint=hint) from error
    return cast("dict[str, Any]", parsed) if isinstance(parsed, dict) else {}


def _id_list(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [int(item) for item in cast("list[Any]", value)] if isinstance(value, list) else []
