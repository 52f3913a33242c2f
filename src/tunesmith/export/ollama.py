"""Ollama Modelfile whose TEMPLATE renders chats as the model's own chat template."""

from __future__ import annotations

import json
from pathlib import Path

from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError
from tunesmith.export import gotemplate
from tunesmith.export.gguf.check import CHATS, rendered_chats
from tunesmith.export.gguf.write import begins_with_bos, stop_order

_TURNS = "{{ range $i, $_ := .Messages }}%s{{ end }}%s"
_CHATML = "<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n"
_CHATML_ANSWER = "<|im_start|>assistant\n"
_GEMMA_TURN = (
    '{{ if eq .Role "user" }}<start_of_turn>user\n'
    "{{ if and $.System (eq $i %s) }}{{ $.System }}\n\n{{ end }}{{ .Content }}<end_of_turn>\n"
    '{{ end }}{{ if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n'
    "{{ end }}"
)
_LLAMA3 = "<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
_MISTRAL = (
    '{{ if eq .Role "user" }}[INST]%s{{ .Content }}%s[/INST]'
    '{{ end }}{{ if eq .Role "assistant" }}%s{{ .Content }}</s>{{ end }}'
)
_MISTRAL_SPACES = [(" ", " ", ""), (" ", " ", " "), (" ", "", " "), ("", "", "")]
_ZEPHYR = "<|{{ .Role }}|>\n{{ .Content }}%s\n"
_DEFAULT = "{{ if not .System }}<|im_start|>system\n%s<|im_end|>\n{{ end }}"
DEFAULT_SYSTEMS = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful assistant",
)
"""System prompts that known templates put in where a chat has none."""
_CHATML_ALL = _TURNS % (_CHATML, _CHATML_ANSWER)
FAMILIES: dict[str, str] = {
    "chatml": _CHATML_ALL,
    **{f"chatml, {text!r}": _DEFAULT % text + _CHATML_ALL for text in DEFAULT_SYSTEMS},
    "qwen3 without thinking": _CHATML_ALL + "<think>\n\n</think>\n\n",
    "llama3": _TURNS % (_LLAMA3, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "gemma": _TURNS % (_GEMMA_TURN % 1, "<start_of_turn>model\n"),
    **{
        f"mistral {number}": _TURNS % (_MISTRAL % spaces, "")
        for number, spaces in enumerate(_MISTRAL_SPACES)
    },
    **{
        f"zephyr {end}": _TURNS % (_ZEPHYR % end, "<|assistant|>\n")
        for end in ("</s>", "<|end|>", "<|endoftext|>", "<|im_end|>")
    },
}  # fmt: skip
"""Known ways to write a chat, as TEMPLATE of a Modelfile."""


def modelfile(template: Template, gguf: str) -> str:
    """The text of a Modelfile for the .gguf file of that name.

    Raises:
        ModelError: no known TEMPLATE writes every probe chat as the model's template does.
    """
    family = find_family(template)
    stops = [template.token_text(number) for number in stop_order(template)]
    lines = [f"FROM ./{gguf}", f'TEMPLATE """{FAMILIES[family]}"""' if family else _RAW]
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
    for name, text in FAMILIES.items():
        differing = first_difference(text, expected)
        if differing is None:
            return name
        count = list(expected).index(differing)
        if count > reached:
            best, reached, at = name, count, differing
    found = gotemplate.render(FAMILIES[best], CHATS[at])
    raise ModelError(
        f"no known TEMPLATE writes chats as this model's template does; the closest, {best}, "
        f"differs at the probe {at!r}: {found!r} instead of {expected[at]!r}",
        hint="--to gguf keeps the chat template itself, which other runtimes read",
    )


def first_difference(text: str, expected: dict[str, str]) -> str | None:
    """The first probe chat that the TEMPLATE writes otherwise."""
    for name, wanted in expected.items():
        if gotemplate.render(text, CHATS[name]) != wanted:
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
