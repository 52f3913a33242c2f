"""Probe texts and chats with which an export is compared with the trained model."""

from __future__ import annotations

from typing import Any

from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.template import Template
from tunesmith.export.merge import PROBES

_QUESTION = {"role": "user", "content": "What is 17 plus 25?"}
_ANSWER = {"role": "assistant", "content": "17 + 25 = 42."}
_FOLLOW_UP = {"role": "user", "content": "Schön! And  in words,\nplease?"}
_SYSTEM = {"role": "system", "content": "You answer in one line."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [_QUESTION],
    "a second question": [_QUESTION, _ANSWER, _FOLLOW_UP],
    "a system prompt and a question": [_SYSTEM, _QUESTION],
    "a system prompt and two questions": [_SYSTEM, _QUESTION, _ANSWER, _FOLLOW_UP],
    "three questions": [_QUESTION, _ANSWER, _FOLLOW_UP, _ANSWER, _QUESTION],
}


def rendered_chats(template: Template) -> dict[str, str]:
    """The probe chats that the template takes, ready for an answer."""
    found: dict[str, str] = {}
    if not template.has_chat_template:
        return found
    for name, chat in CHATS.items():
        try:
            found[name] = template.render(chat, add_generation_prompt=True)
        except RowError:
            continue  # no system prompts, say; then there is nothing to compare
    return found


def probe_texts(template: Template) -> list[str]:
    """Plain texts, and the probe chats as the template writes them."""
    return [*PROBES, *rendered_chats(template).values()]
