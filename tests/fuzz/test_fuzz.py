"""Random input of every kind: nothing but errors of ours, exit codes 0, 1 and 2, no traceback.

`make fuzz` looks longer: TUNESMITH_FUZZ is the number of examples of each test.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import string
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiny import CHATML, chat_rows, tiny_tokenizer
from tunesmith.cli.app import run
from tunesmith.config.dump import to_yaml
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import Recipe
from tunesmith.data.preprocess.ledger import Ledger
from tunesmith.data.preprocess.prepare import iter_prepared, prepare
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.data.templates.load import wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.errors import TunesmithError

EXAMPLES = int(os.environ.get("TUNESMITH_FUZZ", "60"))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="TUNESMITH_FUZZ" not in os.environ,  # `make test` asks the same each time
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        ["", " ", "\n", "<|im_end|>", "<|im_start|>assistant\n", "</think>", "\ud800", "\u202e\x00",
         "{{ 1 }}", "{% x %}", "user", "assistant", "system", "tool", "a" * 5000, "𝔘", "\r\n\x85"]
    ),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(-(10**20), 10**20), st.floats(), st.booleans(), st.none(),
    st.sampled_from([10**400, -1, 0, 1e308, 0.5]),
)  # fmt: skip
KEYS = st.one_of(
    st.sampled_from(
        ["messages", "prompt", "completion", "text", "role", "content", "tools", "weight", "train",
         "tool_calls", "function", "name", "arguments", "type", "conversations", "from", "value",
         "input_ids", "labels", "segments", "label", "template_kwargs", "chat_template_kwargs",
         "instruction", "input", "output", "reasoning_content", "thinking", "question", "answer",
         "chosen", "rejected", "images", "parameters", "id"]
    ),
    st.text(max_size=5),
)  # fmt: skip
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(TEXTS, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=25,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), VALUES),
            "content": st.one_of(TEXTS, VALUES),
        },
        optional={
            "weight": st.one_of(NUMBERS, TEXTS),
            "train": VALUES,
            "tool_calls": VALUES,
            "reasoning_content": VALUES,
            "name": VALUES,
        },
    ),
    max_size=6,
)
ROWS = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.fixed_dictionaries({"messages": st.one_of(MESSAGES, VALUES)}, optional={
        "tools": VALUES, "template_kwargs": VALUES, "chat_template_kwargs": VALUES, "x": VALUES,
    }),
    st.fixed_dictionaries({"prompt": VALUES, "completion": VALUES}, optional={"tools": VALUES}),
    st.fixed_dictionaries({"text": VALUES}),
    st.fixed_dictionaries({"input_ids": VALUES, "labels": VALUES}),
    st.fixed_dictionaries(
        {"input_ids": st.lists(st.integers(-5, 500), max_size=9)},
        optional={"labels": st.lists(st.integers(-200, 500), max_size=9)},
    ),
)  # fmt: skip
JSONS = st.one_of(
    VALUES.map(lambda v: json.dumps(v).encode()),
    st.binary(max_size=60),
    st.sampled_from(
        [b"{}", b"[]", b"[[", b"{", b'"', b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 100_000,
         b'{"a":' * 5000 + b"1" + b"}" * 5000, b"9" * 5000, b"-", b"NaN", b"1e999999", b"\x00",
         b'{"text": "\\ud800"}', b'{"text": "' + b"a" * 300_000 + b'"}', b",", b"{},", b"\n\n",
         b'[{"a": 1},]', b'{"messages": ' + b"[" * 700 + b"]" * 700 + b"}"]
    ),
)  # fmt: skip
LINES = st.lists(JSONS, max_size=6).map(b"\n".join)


def tables(rows: list[dict[str, Any]]) -> pa.Table | None:
    try:
        return pa.Table.from_pylist(rows)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, UnicodeError):
        return None


def files() -> st.SearchStrategy[tuple[str, bytes]]:
    """A file's name and contents: right, damaged, cut or anything."""
    plain = st.tuples(
        st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.tsv", "x.ndjson"]),
        st.one_of(LINES, st.binary(max_size=200), TEXTS.map(lambda t: t.encode(errors="replace"))),
    )
    packed = st.builds(lambda f: (f[0] + ".gz", gzip.compress(f[1])), plain)
    foreign = st.tuples(
        st.sampled_from(["x.parquet", "x.arrow", "x.jsonl.gz", "x.jsonl.zst", "x.csv.gz"]),
        st.binary(max_size=300),
    )
    columnar = st.builds(_columnar, st.lists(ROWS, min_size=1, max_size=4), st.booleans())
    damage = st.tuples(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
    whole = st.one_of(plain, packed, foreign, columnar)
    return st.one_of(whole, st.builds(_damaged, st.one_of(packed, columnar), damage))


def _columnar(rows: list[dict[str, Any]], arrow: bool) -> tuple[str, bytes]:
    table = tables(rows) or pa.table({"text": ["x"]})
    sink = io.BytesIO()
    try:
        if arrow:
            pyarrow.feather.write_feather(table, sink, compression="uncompressed")
        else:
            pyarrow.parquet.write_table(table, sink)
    except (pa.ArrowException, ValueError):
        return "x.parquet", b"PAR1"
    return ("x.arrow" if arrow else "x.parquet"), sink.getvalue()


def _damaged(file: tuple[str, bytes], damage: tuple[int, int, bool]) -> tuple[str, bytes]:
    (name, content), (place, value, cut) = file, damage
    at = place % (len(content) + 1)
    return name, content[:at] + (b"" if cut else bytes([value]) + content[at + 1 :])


@pytest.fixture(scope="module")
def template() -> Template:
    return wrap_tokenizer(tiny_tokenizer(CHATML))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    return folder


@bounded
@given(file=files())
def test_readers(file: tuple[str, bytes], place: Path) -> None:
    name, content = file
    path = place / name
    path.write_bytes(content)
    with contextlib.suppress(TunesmithError):
        for number, row in enumerate(read_rows(Source(name, path=path))):
            assert row.origin.row == number
            assert (row.values is None) != (row.fault is None)


@bounded
@given(file=files())
def test_preview_of_any_file(file: tuple[str, bytes], place: Path) -> None:
    path = place / file[0]
    path.write_bytes(file[1])
    out, err = io.StringIO(), io.StringIO()
    words = ["preview", "--model", str(place / "model"), "--data", str(path), "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(words)
    assert code in (0, 1, 2)
    assert "Traceback" not in err.getvalue()
    for line in out.getvalue().splitlines():
        json.loads(line)


@bounded
@given(rows=st.lists(ROWS, min_size=1, max_size=4), too_long=st.sampled_from(
    ["error", "drop", "truncate", "split"]), length=st.sampled_from([None, 1, 3, 40]))  # fmt: skip
def test_renderer(rows: list[dict], too_long: str, length: int | None, template: Template) -> None:
    source = [Source("rows", rows=rows)]
    how: dict[str, Any] = {"max_length": length, "too_long": too_long}
    with contextlib.suppress(TunesmithError):
        for row in iter_prepared(source, template, **how):
            document = getattr(row.result, "document", None)
            for segment in document.segments if document else ():
                assert len(segment.ids) > 0
                assert (segment.weight > 0).all()
    ledger = Ledger()
    with contextlib.suppress(TunesmithError):
        ledger = prepare(source, template, bad_rows="drop", **how).ledger
    ledger.check()


@bounded
@given(
    kwargs=st.dictionaries(
        st.one_of(
            st.sampled_from(["messages", "tools", "add_generation_prompt", "tokenize", "documents",
                             "chat_template", "return_dict", "enable_thinking", "conversation",
                             "self", "context", "padding", "max_length", "return_tensors"]),
            st.text(string.ascii_letters, max_size=5),
        ),
        VALUES,
        max_size=4,
    )
)  # fmt: skip
def test_arguments_of_templates(kwargs: dict[str, Any], template: Template) -> None:
    messages = chat_rows(2)[1]["messages"]
    with contextlib.suppress(TunesmithError):
        own = wrap_tokenizer(tiny_tokenizer(CHATML), kwargs=kwargs)
        rows = [{"messages": messages}, {"messages": messages, "template_kwargs": kwargs}]
        for _ in iter_prepared([Source("rows", rows=rows)], own, max_length=None):
            pass


SECTIONS = [*Recipe.model_fields]
FIELDS = [
    f"{name}.{field}"
    for name in SECTIONS
    for field in Recipe.model_fields[name].annotation.model_fields  # type: ignore[union-attr]
]
YAMLS = st.one_of(
    st.text(max_size=80),
    VALUES.map(lambda v: yaml.safe_dump(v) if _can_dump(v) else "x: 1"),
    st.dictionaries(st.sampled_from([*SECTIONS, "trian", "a"]), VALUES, max_size=5).map(
        lambda v: yaml.safe_dump(v) if _can_dump(v) else "x: 1"
    ),
    st.sampled_from(
        ["model: m\ndata: &a [*a]", "a: &a {b: *a}", "- 1",
         "model: !!python/object/apply:os.getcwd []",
         "model: {name: !!binary x}", "? {a: 1}\n: 2", "model: m\nmodel: n", "<<: 1", "<<: *x",
         "[" * 3000, "a: " * 50, "model: 2020-99-99", "%YAML 9.9\n---\n", "\t- x", "model: 1_0",
         "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nd: [*c,*c]", "model: .nan", "{", "model: ~"]
    ),
)  # fmt: skip


def _can_dump(value: Any) -> bool:
    try:
        yaml.safe_dump(value)
    except (yaml.YAMLError, ValueError, RecursionError):
        return False
    return True


@bounded
@given(text=YAMLS)
def test_recipes(text: str, place: Path) -> None:
    path = place / "recipe.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with contextlib.suppress(TunesmithError):
        recipe = read_recipe(path)
        assert read_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


@bounded
@given(
    words=st.lists(
        st.one_of(
            st.builds(
                lambda key, value: f"{key}={value}",
                st.one_of(st.sampled_from(FIELDS), KEYS, st.sampled_from(SECTIONS)),
                st.one_of(
                    TEXTS,
                    VALUES.map(lambda v: json.dumps(v)),
                    st.sampled_from(["auto", "1e-5", "[]", "{}", "&a [*a]", "!!python/x", "-1",
                                     "nan",
                                     "50%", "0.5 epoch", "{a: b}", "2020-99-99", "[[["]),
                ),
            ),
            TEXTS,
        ),
        min_size=1,
        max_size=4,
    )
)  # fmt: skip
def test_overrides(words: list[str]) -> None:
    with contextlib.suppress(TunesmithError):
        recipe = read_recipe({"model": "m", "data": "d.jsonl"}, words)
        assert read_recipe(yaml.safe_load(to_yaml(recipe))) == recipe


@bounded
@given(words=st.lists(st.one_of(TEXTS, st.sampled_from(
    ["--model", "--data", "--out", "--rows", "--json", "--help", "--", "-", "=", "preview", "train",
     "plan", "eval", "--version", "--resume", "x=y", "optim.lr=1"])), max_size=5),
    command=st.sampled_from(
        ["train", "preview", "plan", "schema", "init", "chat", "select"]))  # fmt: skip
def test_command_lines(words: list[str], command: str, place: Path) -> None:
    # What a system passes to a program has no zero byte, and no half of a pair.
    words = [w for w in words if w.isprintable() and not w.startswith(("/", "~"))]
    err, before = io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            code = run([command, *words])
    except SystemExit as error:
        code = error.code
    finally:
        os.chdir(before)
    assert code in (0, 1, 2, None)
    assert "Traceback" not in err.getvalue()
