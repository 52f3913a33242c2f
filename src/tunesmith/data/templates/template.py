"""A tokenizer with its chat template and stop tokens (transformers' `apply_chat_template` and
call).

Renders messages to text, encodes text to ids and decodes ids; all else in `data/` uses it for that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.templates.fast_render import Memo, find_direct
from tunesmith.data.templates.sandbox import bounded_sandbox
from tunesmith.data.templates.select import NewToken
from tunesmith.data.templates.timeout import TooSlow
from tunesmith.errors import first_line

_SHORT = 8
"""Id sequences up to this length are decoded once and cached: turn ends, single tokens."""
_TEXTS_KEPT = 4096
_REASON = 500  # characters


@dataclass(frozen=True, slots=True)
class Template:
    """A tokenizer, its chat template, and the ids that end an answer.

    `jinja` is the chat template's text where one was chosen or the tokenizer has exactly one; None
    without a chat template. `kwargs` are passed to every rendering. `added` are tokens that the
    model's own tokenizer lacked, `named` the names (bos_token, ...) that it lacked.
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
        """The SHA-256 in hex of the chat template's text and arguments, on which all ids depend."""
        text = (self.jinja or self.tokenizer.chat_template) if self.has_chat_template else None
        key = json.dumps([text, dict(self.kwargs)], sort_keys=True, default=str)
        return hashlib.sha256(key.encode()).hexdigest()

    def names_role(self, role: str) -> bool:
        """True if the chat template's text has this role's name in quotes, so that it may treat the
        role on its own. Always true without a chat template, which refuses every chat.
        """
        if not self.has_chat_template:
            return True
        own: Any = self.jinja or self.tokenizer.chat_template
        named = cast("Mapping[str, Any]", own) if isinstance(own, Mapping) else {"": own}
        text = "\n".join(str(one) for one in named.values())
        return f"'{role}'" in text or f'"{role}"' in text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages to text.

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
            # A template is untrusted code: any exception means that it can't render this row.
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
        # Called with a batch of one, since transformers accepts an empty conversation only in a
        # batch.
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
        """Encode texts in one call; with `add_special_tokens` BOS is never added twice."""
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
        """Decode ids to text, special tokens included."""
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
        """Save the tokenizer and the chat template in use to a folder."""
        self.tokenizer.save_pretrained(folder)
        if self.jinja is not None:
            (folder / "chat_template.jinja").write_text(self.jinja, encoding="utf-8")


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
