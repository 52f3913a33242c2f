"""Ollama Modelfile whose TEMPLATE (Go's text/template) renders chats as the model's own chat
template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError
from tunesmith.export.gguf.check import CHATS, rendered_chats
from tunesmith.export.gguf.write import begins_with_bos, stop_order

_TURNS = "{{ range $i, $_ := .Messages }}%s{{ end }}%s"
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Family:
    """A known way to write a chat, once as a TEMPLATE and once as turns.

    The tests show with an interpreter of Go templates that both write the same.
    """

    template: str
    turns: Mapping[str, str]
    """Turn of each role, with `{content}`; a role that the family leaves out has none.

    A user's turn has `{system}` where it holds the system prompt.
    """
    answer: str
    default: str = ""
    """What stands in front of a chat without a system prompt."""

    def write(self, chat: Sequence[Mapping[str, Any]]) -> str:
        """The text of the chat, ready for an answer; no two neighbours may have one role."""
        system = next((m["content"] for m in chat if m["role"] == "system"), "")
        parts = [] if system else [self.default]
        for number, message in enumerate(chat):
            turn = self.turns.get(message["role"], "")
            first = f"{system}\n\n" if system and number == 1 else ""
            parts.append(turn.format(content=message["content"], system=first))
        return "".join([*parts, self.answer])


def _of_one_form(turn: str, answer: str, default: str = "") -> Family:
    """All roles have the same turn, but for their name."""
    before = "{{ if not .System }}" + default + "{{ end }}" if default else ""
    go = turn.format(role="{{ .Role }}", content="{{ .Content }}")
    turns = {role: turn.format(role=role, content="{content}") for role in _ROLES}
    return Family(before + _TURNS % (go, answer), turns, answer, default)


def _of_two_forms(user: str, assistant: str, answer: str) -> Family:
    """Users and assistants have turns of their own, and the system prompt has none."""
    system = "{{ if and $.System (eq $i 1) }}{{ $.System }}\n\n{{ end }}"
    turns = {"user": user, "assistant": assistant}
    go = "".join(
        '{{ if eq .Role "'
        + role
        + '" }}'
        + turn.format(content="{{ .Content }}", system=system)
        + "{{ end }}"
        for role, turn in turns.items()
    )
    return Family(_TURNS % (go, answer), turns, answer)


DEFAULT_SYSTEMS = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant",
)
"""System prompts that known templates put in where a chat has none."""
_CHATML = ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_start|>assistant\n")
_LLAMA3 = "<|start_header_id|>{role}<|end_header_id|>\n\n"
_GEMMA = "<start_of_turn>user\n{system}{content}<end_of_turn>\n"
_MISTRAL_SPACES = [(" ", " ", ""), (" ", " ", " "), (" ", "", " "), ("", "", "")]
FAMILIES: dict[str, Family] = {
    "chatml": _of_one_form(*_CHATML),
    **{
        f"chatml, {text!r}": _of_one_form(*_CHATML, f"<|im_start|>system\n{text}<|im_end|>\n")
        for text in DEFAULT_SYSTEMS
    },
    "qwen3 without thinking": _of_one_form(_CHATML[0], _CHATML[1] + "<think>\n\n</think>\n\n"),
    "llama3": _of_one_form(_LLAMA3 + "{content}<|eot_id|>", _LLAMA3.format(role="assistant")),
    "gemma": _of_two_forms(
        _GEMMA, "<start_of_turn>model\n{content}<end_of_turn>\n", "<start_of_turn>model\n"
    ),
    **{
        f"mistral {number}": _of_two_forms(
            f"[INST]{before}{{content}}{after}[/INST]", f"{answer}{{content}}</s>", ""
        )
        for number, (before, after, answer) in enumerate(_MISTRAL_SPACES)
    },
    **{
        f"zephyr {end}": _of_one_form(f"<|{{role}}|>\n{{content}}{end}\n", "<|assistant|>\n")
        for end in ("</s>", "<|end|>", "<|endoftext|>", "<|im_end|>")
    },
}
"""Known ways to write a chat, with their TEMPLATE for a Modelfile."""


def modelfile(template: Template, gguf: str) -> str:
    """The text of a Modelfile for the .gguf file of that name.

    Raises:
        ModelError: no known TEMPLATE writes every probe chat as the model's template does.
    """
    family = find_family(template)
    stops = [template.token_text(number) for number in stop_order(template)]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{FAMILIES[family].template}"""' if family else _RAW]
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in stops]
    return "\n".join(lines) + "\n"


_RAW = 'TEMPLATE """{{ .Prompt }}"""'


def find_family(template: Template) -> str | None:
    """The name of the family that writes every probe chat to the character; None without a chat
    template.

    Raises:
        ModelError: there is none; it names the probe at which the closest one differs.
    """
    if not template.has_chat_template:
        return None
    expected = _without_bos(template, rendered_chats(template))
    if not expected:
        raise ModelError("the chat template takes none of the probe chats")
    best, reached, at = "", -1, ""
    for name, family in FAMILIES.items():
        differing = first_difference(family, expected)
        if differing is None:
            return name
        count = list(expected).index(differing)
        if count > reached:
            best, reached, at = name, count, differing
    found = FAMILIES[best].write(CHATS[at])
    raise ModelError(
        f"no known TEMPLATE writes chats as this model's template does; the closest, {best}, "
        f"differs at the probe {at!r}: {found!r} instead of {expected[at]!r}",
        hint="--to gguf keeps the chat template itself, which other runtimes read",
    )


def first_difference(family: Family, expected: dict[str, str]) -> str | None:
    """The first probe chat that the family writes otherwise."""
    for name, wanted in expected.items():
        if family.write(CHATS[name]) != wanted:
            return name
    return None


def _without_bos(template: Template, texts: dict[str, str]) -> dict[str, str]:
    """The runtime puts the BOS token in front by itself, as the .gguf file tells it to."""
    if not begins_with_bos(template) or template.bos_id is None:
        return texts
    bos = template.token_text(template.bos_id)
    return {name: text.removeprefix(bos) for name, text in texts.items()}


def write_modelfile(template: Template, folder: Path, gguf: str) -> Path:
    """Write `folder`/Modelfile.

    Raises:
        ModelError: as `modelfile`.
    """
    path = folder / "Modelfile"
    path.write_text(modelfile(template, gguf), encoding="utf-8")
    return path
