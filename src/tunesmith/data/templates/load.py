"""Loads a tokenizer and its chat template from a folder or the hub (transformers'
`AutoTokenizer`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from tunesmith.data.templates.date_check import check_dates
from tunesmith.data.templates.fast_render import compile_template
from tunesmith.data.templates.select import choose, with_tokens
from tunesmith.data.templates.stop_tokens import closing_tokens
from tunesmith.data.templates.template import Template
from tunesmith.errors import DataError, ModelError, first_line

_UNBOUNDED = 10**9
"""Tokenizers without a length limit give a `model_max_length` far above this number."""


def load_template(
    model_folder: Path | str,
    *,
    template: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    dated: bool = False,
) -> Template:
    """Load the tokenizer and template of a model folder; it reads configs, but no weights.

    `template`: None for the model's own, "none" for raw text, "chatml" for the built-in one, the
    path of a Jinja file, or the folder or hub id of another model, whose template is taken. `dated`
    allows a template that writes today's date, for texts that are not trained on.

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
    """The template of a tokenizer that is loaded already; the tokenizer is not changed.

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
        # Tokenizer files have many formats, and each parser raises exceptions of its own.
        reason = first_line(error)
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise ModelError(
                "its tokenizer needs Python code from the model folder",
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
