"""A TEMPLATE writes every probe chat as the model's template does, or there is none."""

from __future__ import annotations

import pytest

import gotemplate_oracle as gotemplate
from tiny import CHATML, tiny_tokenizer
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.errors import ModelError
from tunesmith.export.gguf.check import CHATS
from tunesmith.export.ollama import FAMILIES, find_family, modelfile

GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else "
    "m['role']) + '\n' + m['content'] + '<end_of_turn>\n' }}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("jinja", "family"), [(CHATML, "chatml"), (GEMMA, "gemma"), (LLAMA3, "llama3")]
)
def test_families_are_found(jinja: str, family: str) -> None:
    assert find_family(wrap_tokenizer(tiny_tokenizer(jinja))) == family


def test_a_difference_of_one_character_is_refused_and_named() -> None:
    jinja = CHATML.replace("assistant\n", "assistant\n ")
    with pytest.raises(ModelError, match="'a question'"):
        find_family(wrap_tokenizer(tiny_tokenizer(jinja)))


def test_stops_and_file_are_named() -> None:
    text = modelfile(wrap_tokenizer(tiny_tokenizer()), "m.gguf")
    assert text.startswith("FROM ./m.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in text


BRACES = [
    {"role": "system", "content": "{system} {{ .Role }} %s"},
    {"role": "user", "content": "{content} {0} %d"},
    {"role": "assistant", "content": "</s>\n{}"},
    {"role": "user", "content": " a \n"},
]


@pytest.mark.parametrize("chat", [*CHATS, "braces", "braces without a system prompt"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_template_of_a_family_writes_what_its_turns_write(name: str, chat: str) -> None:
    """The turns are compared with the model's chat template, the TEMPLATE is what is exported."""
    others = {"braces": BRACES, "braces without a system prompt": BRACES[1:]}
    messages = CHATS[chat] if chat in CHATS else others[chat]
    text = FAMILIES[name].write(messages)
    assert gotemplate.render(FAMILIES[name].template, messages) == text
    assert all(m["content"] in text for m in messages if m["role"] != "system")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {{- /* x */}}", None),
        ("{{ range .Messages }}{{ .Role }}", None),
        ("{{ .Nothing }}", None),
        ("a \n{{- if .System }} x {{ else }} y {{- end -}} \n z", "a yz"),
        ("{{ range $i, $_ := .Messages }}{{ $i }}{{ .Role }};{{ end }}", "0user;1assistant;"),
        ('{{ range .Messages }}{{ if ne .Role "user" }}{{ .Content }}{{ end }}{{ end }}', "c"),
    ],
)
def test_renderer_does_what_go_does(template: str, text: str | None) -> None:
    chat = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    if text is None:
        with pytest.raises(ValueError, match=r"unknown|no end"):
            gotemplate.render(template, chat)
    else:
        assert gotemplate.render(template, chat) == text


def test_neighbours_of_one_role_become_one() -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert gotemplate.collate(chat) == ("", [{"Role": "user", "Content": "a\n\nb"}])
