"""A chat template is foreign code: whatever it does ends in an error of ours, soon and small."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path

import pytest

from tiny import chat_rows, tiny_tokenizer, write_jsonl
from tunesmith.cli.app import run
from tunesmith.data.row_errors import RowError
from tunesmith.data.templates import sandbox_limits
from tunesmith.data.templates import timeout as clocks
from tunesmith.data.templates.fast_render import compile_template
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.data.templates.timeout import TimeLimit, TooSlow
from tunesmith.errors import TunesmithError

TURN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def doubled(first: str, more: str, end: str = "{{ ns.x|length }}") -> str:
    """A value that is made twice as large 99 times."""
    loop = "{% for i in range(99) %}{% set ns.x = " + more + " %}{% endfor %}"
    return "{% set ns = namespace(x=" + first + ") %}" + loop + end


LARGE = {
    "text times number": "{{ 'a' * 10**10 }}",
    "number times text": "{{ 10000000000 * 'a' }}",
    "times, never reached": "{% if false %}{{ 'a' * 10**10 }}{% endif %}{{ 'b' * 10**10 }}",
    "list times number": "{{ ([messages] * 10**10)|length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power of variables": "{% set n = messages|length + 9 %}{{ n ** (n ** (n ** n)) }}",
    "power of negatives": "{{ (0 - 3) ** (10 ** 12) }}",
    "products": doubled("3", "ns.x * ns.x", "{{ ns.x }}"),
    "remainder": "{{ ('f' * 4000)|int(0, 16) ** 99 % 3 }}",
    "hex number": "{{ ('f' * 9000000)|int(0, 16) }}",
    "bytes to number": "{{ (1).from_bytes(('a' * 9000000).encode(), 'big') }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "doubling by +": doubled("'ab'", "ns.x + ns.x"),
    "doubling by ~": doubled("'ab'", "ns.x ~ ns.x"),
    "doubling a list": doubled("[1, 2]", "ns.x + ns.x"),
    "doubling by join": doubled("'ab'", "[ns.x, ns.x]|join"),
    "doubling by block": (
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}"
        "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}{% endfor %}"
    ),
    "doubling by macro": (
        "{% macro m(x, n) %}{% if n %}{{ m(x ~ x, n - 1) }}{% else %}{{ x }}{% endif %}"
        "{% endmacro %}{{ m('ab', 60) }}"
    ),
    "doubling in one line": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{{ "
    + "m(" * 40 + "'ab'" + ")" * 40 + " }}",
    "nested lists": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x }}"),
    "nested lists as JSON": doubled("[1]", "[ns.x, ns.x]", "{{ ns.x|tojson }}"),
    "nested dicts": doubled("1", "{'a': ns.x, 'b': ns.x}", "{{ ns.x|tojson }}"),
    "nested by dict()": doubled("1", "dict(a=ns.x, b=ns.x)", "{{ ns.x|tojson }}"),
    "deep list": (
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}"
        "{% endfor %}{{ ns.x }}"
    ),
    "center": "{{ 'a'|center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{{ ('\\t' * 9999).expandtabs(10**9) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "indent": "{{ 'a\\nb'|indent(10**10) }}",
    "indent by text": "{{ ('a\\n' * 9000)|indent('b' * 9000000) }}",
    "JSON indent": "{{ messages|tojson(indent=10**10) }}",
    "percent width": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "percent parts": "{{ ('%(a)s' * 90000) % {'a': 'b' * 900000} }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format nested width": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "format filter": "{{ '%10000000000d'|format(1) }}",
    "format parts": "{{ ('{0}' * 90000).format('b' * 900000) }}",
    "replace": "{{ ('a' * 900000).replace('a', 'b' * 900000) }}",
    "replace filter": "{{ ('a' * 900000)|replace('a', 'b' * 900000) }}",
    "replace nothing": "{{ ('a' * 900000).replace('', 'b' * 900000) }}",
    "join": "{{ ('b' * 900000).join('a' * 900000) }}",
    "join filter": "{{ ('a' * 900000)|join('b' * 900000) }}",
    "translate": "{{ ('a' * 900000).translate({97: 'b' * 900000}) }}",
    "sum of lists": "{{ (range(9000)|batch(1)|list)|sum(start=[]) }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "round": "{{ 1.5|round(10**10, 'ceil') }}",
    "output": "{% set x = 'a' * 900000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "many parts": "{% set x = 'a' * 9000000 %}{{ " + " ~ ".join(["x"] * 400) + " }}",
    "many sums": "{% set x = 'a' * 9000000 %}{{ " + " + ".join(["x"] * 400) + " }}",
    "many variables": "{% set x = 'a' * 9000000 %}"
    + "".join(f"{{% set x{i} = x|upper %}}{{% set y{i} = x[1:] %}}" for i in range(400)),
    "block of an inheritance": "{% block a %}{{ 'a' }}{% endblock %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "loop recursion": "{% for a in [messages] recursive %}{{ loop([a]) }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "deep lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "deep ifs": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "deep fors": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "long sum": "{{ " + "+".join(["'a'"] * 60000) + " }}",
    "long number": "{{ " + "9" * 100000 + " }}",
    "long template": "a" * 300000,
    "unfinished": "{% for" * 20000,
}  # fmt: skip

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__')|attr('__base__') }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__.sys }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].getcwd() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '%s'.__mod__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{% import 'os' as os %}{{ os }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ (messages|map(attribute='__class__')|list)[0] }}",
    "{{ strftime_now.__globals__ }}",
]

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "calls": "{% macro m(n) %}{% for i in range(9) %}{% if n %}{{ m(n - 1) }}{% endif %}"
    "{% endfor %}{% endmacro %}{{ m(60) }}",
    "filters": "{% for i in range(99999) %}"
    "{{ range(99999)|map('string')|sort|length }}{% endfor %}",
    "only with messages": "{% if messages|length > 1 %}{% for i in range(99999) %}"
    "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
}


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter time, and memory that a bomb would exceed."""
    monkeypatch.setattr(sandbox_limits.clock, "seconds", 0.5)


def template(text: str) -> Template:
    return wrap_tokenizer(tiny_tokenizer(text), dated=True)


def outcome(text: str, messages: list[dict]) -> str:
    """The text, or `refused: why`; anything but an error of ours is raised."""
    try:
        return template(text).render(messages)
    except RowError as error:
        return f"refused: {error.fault.message}"
    except TunesmithError as error:
        return f"refused: {error.message}"


MESSAGES = chat_rows(3)[2]["messages"]


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", LARGE)
def test_large_things_are_refused_while_they_are_small(name: str) -> None:
    before = peak()
    assert outcome(LARGE[name] + TURN, MESSAGES).startswith("refused: ")
    assert peak() - before < 1 << 30


@pytest.mark.parametrize("text", ESCAPES)
def test_python_is_out_of_reach(text: str) -> None:
    """Refused, or nothing: an attribute that a template may not see is undefined to it."""
    found = outcome(text, MESSAGES)
    assert found.startswith("refused: ") or found == "", found


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_end(name: str) -> None:
    with pytest.raises(TooSlow, match="ran too long"):
        template(ENDLESS[name] + TURN).render(MESSAGES)


def test_endless_template_ends_every_command_with_2(tmp_path: Path, capsys) -> None:
    tiny_tokenizer(ENDLESS["only with messages"] + TURN).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    data = str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(4)))
    for words in (["preview"], ["preview", "--json"], ["doctor"]):
        assert run([*words, "--model", str(tmp_path / "model"), "--data", data]) == 2
        error = capsys.readouterr().err
        assert "ran too long" in error
        assert "Traceback" not in error


def test_large_template_is_refused_row_by_row_with_2(tmp_path: Path, capsys) -> None:
    tiny_tokenizer(LARGE["power"] + TURN).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    data = str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(4)))
    assert run(["preview", "--model", str(tmp_path / "model"), "--data", data]) == 2
    error = capsys.readouterr().err
    assert "number of too many digits" in error
    assert "rows.jsonl:0" in error


@pytest.mark.parametrize("name", ["deep brackets", "long template", "power", "range"])
def test_template_in_a_file_is_refused_with_2(name: str, tmp_path: Path, capsys) -> None:
    tiny_tokenizer(TURN).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    file = tmp_path / "t.jinja"
    file.write_text(LARGE[name])
    data = str(write_jsonl(tmp_path / "rows.jsonl", chat_rows(4)))
    words = ["preview", "--model", str(tmp_path / "model"), "--data", data]
    assert run([*words, f"data.template={file}"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_what_real_templates_do_is_the_same_within_limits() -> None:
    """Sums, joins, filters, slices and macros give what jinja's own sandbox gives."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    text = (
        "{% macro say(m, n=2) %}{{ '[' + m.role + ']' ~ m.content|trim * 1 }}{{ n ** 3 % 5 }}"
        "{% endmacro %}{{ '**%s** 20240726' % 1 }}{{ '**{}** 20240726: 12345'.format(2) }}"
        "{% set all = messages[1:] + [messages[0]] %}"
        "{%- for m in all if m.role != 'x' -%}{{ say(m) }}{{ '%-4s|' % m.role }}"
        "{{ m.role.ljust(12, '.') }}{{ loop.index // 2 }}{{ m|tojson|indent(2) }}"
        "{{ m.content.split(' ')|map('upper')|list|join('-') }}{{ '{:>8}'.format(m.role) }}"
        "{{ {'r': m.role, 'n': [m.content, 1]} }}{% endfor %}{{ (1, messages|length)|sum }}"
        "{{ messages|map(attribute='role')|unique|list }}{{ 'a\tb'.expandtabs(4) }}"
        "{{ messages[-1]['content'][:3].replace('a', 'bb')|center(9) }}{{ 7.25|round(1) }}"
    )
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = lambda x: json.dumps(x, ensure_ascii=False)
    assert template(text).render(MESSAGES) == plain.from_string(text).render(messages=MESSAGES)


def test_template_that_was_compiled_before_is_bounded_all_the_same() -> None:
    from transformers.utils import chat_template_utils

    text = "{% set x = 'a' * 20000000 %}{{ x|length }}" + TURN
    cached = chat_template_utils._compile_jinja_template(text)
    assert cached.render(messages=[]) == "20000000"
    with pytest.raises(sandbox_limits.TooLarge):
        compile_template(text).render(messages=[])


def test_long_row_is_no_bomb() -> None:
    long = [{"role": "user", "content": "word " * 1_000_000}]
    assert len(template(TURN).render(long)) > 5_000_000


def test_clock_spares_who_is_in_time_and_waits_for_nobody() -> None:
    clock = TimeLimit(seconds=30)
    for _ in range(1000):
        assert clock.enter() == [0]
        clock.leave()
    assert clock.entry == [0]


def forever(clock: TimeLimit) -> None:
    clock.enter()
    try:
        while True:
            pass
    finally:
        clock.leave()


def test_clock_ends_a_thread_that_is_not_the_main_one() -> None:
    clock, found = TimeLimit(seconds=0.2), []

    def work() -> None:
        try:
            forever(clock)
        except TooSlow as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert len(found) == 1


def test_clock_counts_work_not_waiting() -> None:
    clock = TimeLimit(seconds=0.2)
    clock.enter()
    time.sleep(1.0)
    clock.leave()


def test_clock_watches_again_after_it_has_rested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "_LOOKS", 0.01)
    monkeypatch.setattr(clocks, "_IDLE", 1)
    clock = TimeLimit(seconds=0.05)
    for _ in range(3):
        time.sleep(0.2)
        with pytest.raises(TooSlow):
            forever(clock)
