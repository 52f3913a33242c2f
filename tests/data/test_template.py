"""Template: stop tokens, BOS, context, and errors of foreign templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny import CHATML, tiny_tokenizer
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.load import load_template, wrap_tokenizer
from tunesmith.errors import DataError, ModelError

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def folder(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_stop_ids_unite_generation_config_eos_and_turn_end(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(folder)
    assert load_template(folder).stop_ids == {0, 2, 7, 9}  # 0 is eos, 2 closes a turn


def test_context_comes_from_the_config_then_the_tokenizer(folder):
    assert load_template(folder).context_length == 512
    (folder / "config.json").write_text('{"max_position_embeddings": 64}')
    assert load_template(folder).context_length == 64
    (folder / "config.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 10**30
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_template(folder).context_length is None


def test_another_template_replaces_the_models_own(folder, tmp_path):
    path = tmp_path / "other.jinja"
    path.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert load_template(folder, template=str(path)).render(USER) == "[hi]"
    assert not load_template(folder, template="none").has_chat_template
    with pytest.raises(DataError, match="can't be read"):
        load_template(folder, template=str(tmp_path / "missing.jinja"))
    path.write_text("{% for %}")
    with pytest.raises(DataError, match="not a Jinja template"):
        load_template(folder, template=str(path))


def test_kwargs_reach_the_template_and_rows_outweigh_them():
    template = wrap_tokenizer(tiny_tokenizer("{{ mood }}"), kwargs={"mood": "calm"})
    assert template.render(USER) == "calm"
    assert template.render(USER, kwargs={"mood": "wild"}) == "wild"


def test_a_templates_own_refusal_is_a_fault_of_the_row():
    template = wrap_tokenizer(tiny_tokenizer("{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(RowError, match="roles must alternate") as caught:
        template.render(USER)
    assert caught.value.fault.kind == "template-refused"


def test_no_chat_template_is_said_with_a_way_out():
    with pytest.raises(RowError) as caught:
        wrap_tokenizer(tiny_tokenizer(None)).render(USER)
    assert caught.value.fault.kind == "no-chat-template"
    assert "data.template=none" in caught.value.fault.hint


def test_bos_is_never_doubled():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(CHATML, bos_token="<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    template = wrap_tokenizer(tokenizer)
    plain, opened = template.encode(["hi", "<|endoftext|>hi"], add_special_tokens=True)
    assert plain == opened
    assert plain.count(0) == 1


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelError, match="tokenizer can't be read"):
        load_template(tmp_path)


def _trl_template(name):
    trl = pytest.importorskip("trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def test_a_template_that_writes_todays_date_is_refused():
    with pytest.raises(DataError, match="today's date") as caught:
        wrap_tokenizer(tiny_tokenizer("{{ strftime_now('%Y') }}" + CHATML))
    assert "data.template=FILE.jinja" in caught.value.hint


def test_a_date_that_the_arguments_give_is_a_choice():
    dated = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}" + CHATML
    with pytest.raises(DataError, match="today's date") as caught:
        wrap_tokenizer(tiny_tokenizer(dated))
    assert "data.template_kwargs='{date_string: " in caught.value.hint
    template = wrap_tokenizer(tiny_tokenizer(dated), kwargs={"date_string": "1 May 2025"})
    assert template.render(USER).startswith("1 May 2025")


def test_a_date_may_stand_where_nothing_is_learned(folder):
    tiny_tokenizer("{{ strftime_now('%Y') }}" + CHATML).save_pretrained(folder)
    with pytest.raises(DataError, match="today's date"):
        load_template(folder)
    assert load_template(folder, dated=True).has_chat_template


def test_a_clock_that_no_text_shows_is_no_date():
    wrap_tokenizer(tiny_tokenizer("{% if false %}{{ strftime_now('%Y') }}{% endif %}" + CHATML))


@pytest.mark.parametrize(
    ("name", "argument"), [("llama3_2", "date_string"), ("muse_glimmer", "current_date")]
)
def test_published_templates_with_a_date_name_the_argument(name, argument):
    tokenizer = tiny_tokenizer(_trl_template(name), bos_token="<|endoftext|>")
    with pytest.raises(DataError, match="today's date") as caught:
        wrap_tokenizer(tokenizer)
    assert f"{{{argument}: " in caught.value.hint
    wrap_tokenizer(tokenizer, kwargs={argument: "26 Jul 2024"})


def test_published_templates_with_a_fixed_date_are_taken():
    wrap_tokenizer(tiny_tokenizer(_trl_template("llama3_1"), bos_token="<|endoftext|>"))
    with pytest.raises(DataError, match="today's date"):
        wrap_tokenizer(tiny_tokenizer(_trl_template("gptoss")))


def test_two_templates_of_one_process_read_tool_calls_each_for_itself():
    jinja = "{% for m in messages %}{{ m.tool_calls[0].function.arguments.at }}{% endfor %}"
    first, second = (wrap_tokenizer(tiny_tokenizer(text)) for text in (jinja, jinja + "!"))
    call = {"type": "function", "function": {"name": "find", "arguments": {"at": "Oslo"}}}
    calls = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert [first.render(calls), second.render(calls), first.render(calls)] == [
        "Oslo",
        "Oslo!",
        "Oslo",
    ]


ALWAYS_ASKING = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end_header|>\n{{ m.content }}<|eot|>{% endfor %}"
    "{{ '<|start|>assistant<|end_header|>\n' }}"
)


def test_a_header_that_is_always_there_is_no_end_of_a_turn():
    from tunesmith.data.formats.detect import to_example
    from tunesmith.data.rendering.render import render_example
    from tunesmith.types import Origin

    markers = ("<|start|>", "<|end_header|>", "<|eot|>")
    tokenizer = tiny_tokenizer(ALWAYS_ASKING, extra_special=markers, eos_token="<|endoftext|>")
    template = wrap_tokenizer(tokenizer)
    assert {template.token_text(token) for token in template.stop_ids} == {
        "<|endoftext|>",
        "<|eot|>",
    }
    row = {"messages": [*USER, {"role": "assistant", "content": "Hello."}]}
    example = to_example(row, format="messages")
    document = render_example(example, template, origin=Origin("t", 0)).document
    segment = document.segments[0]
    assert template.decode(segment.ids[segment.index]) == "Hello.<|eot|>"


def test_messages_with_calls_render_however_many_came_before(monkeypatch):
    from tunesmith.data.templates import fast_render

    monkeypatch.setattr(fast_render, "_KEPT", 3)
    source = "{% for m in messages %}{{ m.role }}{{ m.tool_calls | tojson }}{% endfor %}"
    template = wrap_tokenizer(tiny_tokenizer(source))
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [
        {"role": "assistant", "content": str(n), "tool_calls": [{**call, "id": str(n)}]}
        for n in range(9)
    ]
    whole = template.render(messages)
    assert all(whole.startswith(template.render(messages[:n])) for n in range(9))
