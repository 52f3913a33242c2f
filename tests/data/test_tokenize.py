"""Rows rendered together are, to the bit, rows rendered alone by whole texts through transformers.

Together they go through `Encoder`, which cuts texts apart and remembers words, and through the
template called directly; alone through `apply_chat_template` and the tokenizer itself.
"""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import pytest
from test_document_store import same

from template_oracle import NAMES, make_chat, template_of
from tiny import CHATML, chat_rows, tiny_tokenizer
from tunesmith.data.formats.detect import FORMATS, to_example
from tunesmith.data.preprocess.render_batch import Options, Task, render_batch
from tunesmith.data.rendering.render import Rendered, render_example
from tunesmith.data.rendering.tokenize import Encoder
from tunesmith.data.rendering.unread import account
from tunesmith.data.row_errors import Fault, RowError
from tunesmith.data.templates.load import load_template, wrap_tokenizer
from tunesmith.data.templates.template import Template
from tunesmith.types import Origin

ORIGIN = Origin("made", 0)
WORDS = (
    "river", " 42", "\n\n", "Oslo?", "é", "  ", "I'll", "日本", "{}", "e\u0301", "x  7", "\t",
    "<|im_end|>", "'S", "1234567", "...", " \n", "🦊", "\u00a0", "don’t", "",
)  # fmt: skip
LIMITS = [(None, "error"), (40, "truncate"), (40, "split"), (40, "drop"), (40, "error")]


def text(made: random.Random) -> str:
    return made.choice(["", " "]).join(made.choices(WORDS, k=made.randint(0, 8)))


def rows_of(format: str, template: Template, made: random.Random) -> list[dict[str, Any]]:
    """Rows of a format, good and bad."""
    return [{}, {next(iter(FORMATS[format])): 7}, *globals()[f"_{format}"](template, made)]


def _messages(template: Template, made: random.Random) -> list[dict[str, Any]]:
    odd: list[Any] = [[], "no list", [{"role": "user", "content": 3}], [{"content": "?"}]]
    odd.append([{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}])
    chats = [*chat_rows(3), *({"messages": one} for one in odd)]
    for _ in range(8):
        chats.append(make_chat(made))
        turns = [
            {"role": ("user", "assistant")[n % 2], "content": text(made)}
            for n in range(made.randint(1, 6))
        ]
        chats.append({"messages": turns})
    return chats


def _sharegpt(template: Template, made: random.Random) -> list[dict[str, Any]]:
    roles = ("human", "gpt", "human", "gpt", "function_call", "tool", "narrator")
    return [
        {"conversations": [{"from": made.choice(roles), "value": text(made)} for _ in range(n)]}
        for n in range(8)
    ]


def _preference(template: Template, made: random.Random) -> list[dict[str, Any]]:
    sides = [{"chosen": text(made), "rejected": text(made), "prompt": "?"} for _ in range(5)]
    chats = [chat["messages"] for chat in chat_rows(3)]
    return [*sides, *({"chosen": one, "rejected": one[:-1]} for one in chats)]


def _prompt_completion(template: Template, made: random.Random) -> list[dict[str, Any]]:
    pairs = [{"prompt": text(made), "completion": text(made)} for _ in range(8)]
    answer = [{"role": "assistant", "content": text(made)}]
    asked = [{"role": "user", "content": "Who?"}]
    return [*pairs, {"prompt": asked, "completion": answer}, {"prompt": asked, "completion": "?"}]


def _alpaca(template: Template, made: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "instruction": text(made),
            "input": text(made),
            "output": text(made),
            "history": [["a", text(made)]] * made.randint(0, 2),
        }
        for _ in range(8)
    ]


def _text(template: Template, made: random.Random) -> list[dict[str, Any]]:
    return [{"text": text(made)} for _ in range(12)]


def _segments(template: Template, made: random.Random) -> list[dict[str, Any]]:
    rows = []
    for _ in range(8):
        parts = [{"text": text(made), "train": made.random() < 0.5} for _ in range(4)]
        rows.append({"segments": [*parts, {"text": "end<|im_end|>", "train": True}]})
    return rows


def _tokens(template: Template, made: random.Random) -> list[dict[str, Any]]:
    size, stop = len(template.tokenizer), min(template.stop_ids)
    rows: list[dict[str, Any]] = [{"input_ids": [1, size]}, {"input_ids": []}]
    for _ in range(6):
        ids = [*made.choices(range(size), k=made.randint(1, 60)), stop]
        mask = [made.randint(0, 1) for _ in ids]
        rows += [{"input_ids": ids, "loss_mask": [*mask[:-1], 1]}, {"input_ids": ids}]
    return rows


def _templated_text(template: Template, made: random.Random) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{"text": "no marker"}, {"text": ""}]
    for _ in range(6):
        try:
            whole = template.render(make_chat(made)["messages"])
        except RowError:
            continue
        rows += [{"text": whole}, {"text": whole[: made.randint(0, len(whole))]}]
    return rows


def slowly(template: Template) -> Template:
    """The same template, asked through transformers alone."""
    slow = dataclasses.replace(template)
    slow.memo.tried = True
    return slow


def alone(
    values: dict[str, Any], format: str, template: Template, options: Options
) -> Rendered | Fault:
    try:
        example = to_example(values, format=format, templated=template.has_chat_template)
        # The fields come before anything is rendered, as in a batch.
        roles = () if isinstance(options.train_on, str) else options.train_on
        fields = account(values, format, example, template, roles=roles)
        rendered = render_example(
            example,
            template,
            train_on=options.train_on,
            max_length=options.max_length,
            too_long=options.too_long,
            origin=ORIGIN,
        )
        return dataclasses.replace(rendered, fields=fields)
    except RowError as error:
        return error.fault


def compare_rows(
    rows: list[dict[str, Any]], format: str, template: Template, options: Options
) -> int:
    """How many rows have a document; fails where one differs from the row alone."""
    tasks = [Task(ORIGIN, values, format, False) for values in rows]
    together = render_batch(tasks, template, Encoder(template), options)
    slow, found = slowly(template), 0
    for values, got in zip(rows, together, strict=True):
        if isinstance(got, Fault) and got.kind == "unknown-format":
            continue  # said before the row is read
        expected = alone(values, format, slow, options)
        if isinstance(expected, Fault) or isinstance(got, Fault):
            assert got == expected, values
            continue
        assert dataclasses.replace(got, document=None) == dataclasses.replace(
            expected, document=None
        ), values
        assert (got.document is None) == (expected.document is None), values
        if got.document is not None and expected.document is not None:
            assert same(got.document, expected.document), values
            found += 1
    return found


@pytest.mark.parametrize("train_on", ["auto", "last", "all", ["user", "assistant"]])
@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_is_its_rows_under_every_policy(format, train_on):
    template, made = wrap_tokenizer(tiny_tokenizer(CHATML)), random.Random(5)
    assert Encoder(template)._parts is not None, "the texts must be cut apart"
    found = [
        compare_rows(rows_of(format, template, made), format, template, Options(train_on, *limit))
        for limit in LIMITS
    ]
    roles_of_none = isinstance(train_on, list) and format in (
        "tokens",
        "segments",
        "templated_text",
    )
    assert bool(found[0]) is not roles_of_none


@pytest.mark.skipif(not NAMES, reason="trl, whose templates these are, is missing")
@pytest.mark.parametrize("name", NAMES or ["none"])
def test_a_batch_is_its_rows_under_published_templates(name):
    template, made = template_of(name), random.Random(name)
    assert Encoder(template)._parts is not None, "the texts must be cut apart"
    found = [
        compare_rows(rows_of(format, template, made), format, template, Options())
        for format in FORMATS
    ]
    assert sum(found) > 20


def test_a_batch_is_its_rows_without_a_chat_template():
    template, made = wrap_tokenizer(tiny_tokenizer(), template="none"), random.Random(2)
    found = {
        format: compare_rows(rows_of(format, template, made), format, template, Options())
        for format in FORMATS
    }
    assert found["prompt_completion"]
    assert found["text"]
    assert not found["messages"]


def test_a_wrong_table_of_words_is_seen():
    template = wrap_tokenizer(tiny_tokenizer(CHATML))
    encoder = Encoder(template)
    (right,) = encoder.encode([("river", False)])
    encoder._table["river"] = b"\x01\x00\x00\x00"
    (wrong,) = encoder.encode([("river", False)])
    assert right.tolist() == template.encode(["river"])[0] != wrong.tolist()


def _real_tokenizers() -> list[Path]:
    root = os.environ.get("TUNESMITH_TOKENIZERS")
    return sorted({path.parent for path in Path(root).rglob("tokenizer.json")}) if root else []


@pytest.mark.slow
@pytest.mark.parametrize("folder", _real_tokenizers(), ids=str)
def test_a_batch_is_its_rows_under_real_tokenizers(folder):
    """TUNESMITH_TOKENIZERS names a folder with tokenizers of real models somewhere below it."""
    template, made = load_template(folder, dated=True), random.Random(4)
    encoder = Encoder(template)
    texts = [text(made) for _ in range(5000)]
    for special in (False, True):
        expected = template.encode(texts, add_special_tokens=special)
        got = encoder.encode([(one, special) for one in texts])
        assert [ids.tolist() for ids in got] == expected
    for format in FORMATS:
        compare_rows(rows_of(format, template, made), format, template, Options())
