"""Every format against the same conversation given as messages, and against ids made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiny import tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.data.formats.convert import convert_row
from tunesmith.data.formats.detect import FORMATS, detect_format, to_example
from tunesmith.data.preprocess.holdout import row_digest
from tunesmith.data.preprocess.prepare import prepare
from tunesmith.data.rendering.render import render_example
from tunesmith.data.row_errors import RowError
from tunesmith.data.sources.sources import Source
from tunesmith.data.templates.load import load_template
from tunesmith.data.templates.template import Template
from tunesmith.errors import DataError
from tunesmith.types import Document, Origin

ASK, SAY = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
MORE, SAY_MORE = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}
SYSTEM = {"role": "system", "content": "be short"}
ORIGIN = Origin("made", 0)

PAIRS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4"},
                {"from": "User", "value": "why?"},
                {"from": "chatgpt", "value": "so"},
            ],
            "system": "be short",
        },
        [SYSTEM, ASK, SAY, MORE, SAY_MORE],
    ),
    "sharegpt by role": ({"conversations": [ASK, SAY]}, [ASK, SAY]),
    "alpaca": (
        {"instruction": "2+2?", "input": "", "output": "4"},
        [ASK, SAY],
    ),
    "alpaca, input": (
        {"instruction": "add", "input": "2+2?", "output": "4"},
        [{"role": "user", "content": "add\n2+2?"}, SAY],
    ),
    "alpaca, history": (
        {"instruction": "why?", "output": "so", "history": [["2+2?", "4"]], "system": "be short"},
        [SYSTEM, ASK, {**SAY, "train": False}, MORE, SAY_MORE],
    ),
    "preference, strings": (
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        [ASK, SAY],
    ),
    "preference, messages": (
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY_MORE]},
        [ASK, SAY],
    ),
    "preference, no prompt": (
        {"chosen": [ASK, SAY, MORE, SAY_MORE], "rejected": [ASK, SAY, MORE, SAY]},
        [ASK, {**SAY, "train": False}, MORE, SAY_MORE],
    ),
    "preference, whole chats beside the prompt": (
        {"prompt": "2+2?", "chosen": [ASK, SAY], "rejected": [ASK, SAY_MORE]},
        [ASK, SAY],
    ),
    "prompt_completion": ({"prompt": [ASK], "completion": [SAY]}, [ASK, SAY]),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return load_template(tiny_folder(tmp_path_factory.mktemp("model")))


def render(template: Template, values: dict[str, Any], format: str | None = None, **options: Any):
    chosen = format or detect_format(values)
    assert chosen is not None
    example = to_example(values, format=chosen)
    return render_example(example, template, origin=ORIGIN, **options)


def document(template: Template, values: dict[str, Any], format: str | None = None) -> Document:
    found = render(template, values, format).document
    assert found is not None
    return found


def learned(found: Document) -> list[list[int]]:
    """The whole ids and the learned ids of a document."""
    ids = np.concatenate([segment.ids for segment in found.segments])
    targets = np.concatenate([segment.ids[segment.index] for segment in found.segments])
    return [ids.tolist(), targets.tolist()]


def fault(values: dict[str, Any], format: str, template: Template | None = None):
    try:
        example = to_example(values, format=format)
        assert template is not None, "reading it must be refused"
        render_example(example, template, origin=ORIGIN)
    except RowError as error:
        return error.fault
    raise AssertionError("it was not refused")


@pytest.mark.parametrize("name", PAIRS)
def test_a_dialect_teaches_what_its_messages_teach(name: str, template: Template) -> None:
    values, messages = PAIRS[name]
    assert detect_format(values) == name.split(",")[0].split(" ")[0]
    mine, plain = document(template, values), document(template, {"messages": messages})
    assert learned(mine) == learned(plain)
    converted = convert_row(values, format=detect_format(values) or "", to="messages")
    assert learned(document(template, converted)) == learned(plain)


@pytest.mark.parametrize("name", [name for name in PAIRS if "sharegpt" not in name])
def test_completions_survive_being_converted(name: str, template: Template) -> None:
    values, messages = PAIRS[name]
    converted = convert_row(values, format=detect_format(values) or "", to="prompt_completion")
    assert set(converted) == {"prompt", "completion"}
    assert learned(document(template, converted)) == learned(
        document(template, {"messages": messages})
    )


def test_function_calls_of_sharegpt_become_tool_calls() -> None:
    call = {"name": "add", "arguments": {"a": 2}}
    row = {
        "conversations": [
            {"from": "human", "value": "2+2?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "4"},
            {"from": "gpt", "value": "4"},
        ],
        "tools": "[]",
        "id": 7,
    }
    converted = convert_row(row, format="sharegpt", to="messages")
    assert converted["id"] == 7
    roles = [message["role"] for message in converted["messages"]]
    assert roles == ["user", "assistant", "tool", "assistant"]
    assert converted["messages"][1]["tool_calls"] == [{"type": "function", "function": call}]
    assert converted["messages"][1]["content"] == ""


@pytest.mark.parametrize(
    ("format", "values", "kind", "said"),
    [
        ("sharegpt", {"conversations": "x"}, "wrong-type", "a list of turns"),
        ("sharegpt", {"conversations": [{"from": "martian", "value": ""}]}, "unknown-role", "mart"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f("}]}, "wrong-type",
         "no function call in JSON"),
        ("alpaca", {"instruction": 3, "output": "x"}, "wrong-type", "`instruction`"),
        ("alpaca", {"instruction": "x", "output": "y", "history": ["a"]}, "wrong-type", "a pair"),
        ("preference", {"chosen": "x", "rejected": "y"}, "missing-column", "no `prompt`"),
        ("preference", {"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, "no-answer", "all of it"),
        ("segments", {"segments": [{"text": "x"}]}, "wrong-type", "segments[0].train"),
        ("segments", {"segments": []}, "empty-text", "no text"),
        ("tokens", {"input_ids": [1, 2], "labels": [2, 3]}, "labels-mismatch", "not"),
        ("tokens", {"input_ids": [1, 2], "labels": [1]}, "wrong-length", "1 entries"),
        ("tokens", {"input_ids": [1, "2"]}, "wrong-type", "whole numbers"),
        ("tokens", {"input_ids": [1, True]}, "wrong-type", "whole numbers"),
        ("tokens", {"input_ids": [1, 2], "labels": [-100, 2], "loss_mask": [1, 1]},
         "conflicting-wishes", "different"),
        ("tokens", {"input_ids": [1, 2], "attention_mask": [1, 0]}, "padding", "zeros"),
        ("tokens", {"input_ids": [1, 2], "weights": [1]}, "wrong-length", "1 entries"),
        ("tokens", {"input_ids": [1, 2], "weights": [1, -0.5]}, "wrong-type", "weights[1]"),
        ("tokens", {"input_ids": [1, 2], "weights": [1, float("nan")]}, "wrong-type", "finite"),
        ("tokens", {"input_ids": [1, 2], "weights": [1, True]}, "wrong-type", "numbers"),
        ("tokens", {"input_ids": [1, 2], "weights": 2}, "wrong-type", "numbers"),
        ("tokens", {"input_ids": [1, 2], "completion_mask": [0, 2]}, "wrong-type", "0 and 1"),
    ],
)  # fmt: skip
def test_faults_name_their_place(format: str, values: dict, kind: str, said: str) -> None:
    found = fault(values, format)
    assert (found.kind, said in f"{found.message} {found.hint}") == (kind, True), found


def test_segments_are_learned_as_marked(template: Template) -> None:
    stop = template.token_text(sorted(template.stop_ids)[0])
    row = {
        "segments": [
            {"text": "ask: ", "train": False},
            {"text": "more ", "train": False},
            {"text": "the answer" + stop, "label": True},
            {"text": "after", "train": False},
        ]
    }
    found = render(template, row)
    asked, answer, rest = template.encode(["ask: more ", "the answer" + stop, "after"])
    assert found.document is not None
    assert learned(found.document) == [asked + answer, answer]
    assert (found.tokens, found.unused) == (len(asked + answer + rest), len(rest))
    row["segments"][2:] = [{"text": "no end", "train": True}]
    assert fault(row, "segments", template).kind == "no-stop-token"
    row["segments"].append({"text": "after", "train": False})
    assert fault(row, "segments", template).kind == "no-stop-token"


def test_tokens_are_the_document_they_were_made_of(template: Template) -> None:
    whole = learned(document(template, {"messages": [ASK, SAY, MORE, SAY_MORE]}))
    made = document(template, {"messages": [ASK, SAY, MORE, SAY_MORE]})
    (segment,) = made.segments
    labels = [-100] * len(segment.ids)
    for at in segment.index:
        labels[at] = int(segment.ids[at])
    ids = segment.ids.tolist()
    assert learned(document(template, {"input_ids": ids, "labels": labels})) == whole
    mask = [int(label != -100) for label in labels]
    assert learned(document(template, {"input_ids": ids, "assistant_masks": mask})) == whole
    everything = learned(document(template, {"input_ids": ids}))
    assert everything == [ids, ids[1:]]
    beyond = [*ids, len(template.tokenizer)]
    assert fault({"input_ids": beyond}, "tokens", template).kind == "unknown-token"


def test_each_token_may_have_a_weight(template: Template) -> None:
    stop = min(template.stop_ids)
    ids = [*range(15, 23), stop]
    weights = [1, 0, 2, 0.5, 0, 1, 0.25, 3, 1.5]

    def weighed(row: dict[str, Any], **options: Any) -> list[tuple[int, float]]:
        found = render(template, row, **options).document
        assert found is not None
        return [
            (int(segment.ids[at]), float(weight))
            for segment in found.segments
            for at, weight in zip(segment.index, segment.weight, strict=True)
        ]

    pairs = list(zip(ids, weights, strict=True))
    assert weighed({"input_ids": ids, "weights": weights}) == [p for p in pairs[1:] if p[1]]
    labels = [-100, -100, -100, 18, 19, -100, -100, 22, stop]
    both = {"input_ids": ids, "weights": weights, "labels": labels}
    assert weighed(both) == [(18, 0.5), (22, 3.0), (stop, 1.5)]
    assert weighed(both, train_on="last") == [(22, 3.0), (stop, 1.5)]
    full = [1 + n / 8 for n in range(len(ids))]
    row = {"input_ids": ids, "weights": full}
    assert weighed(row) == weighed(row, train_on="all") == list(zip(ids, full, strict=True))[1:]
    pieces = weighed(row, max_length=4, too_long="split")
    first = {ids[0], ids[4], ids[7]}  # of each piece; nothing predicts it
    assert pieces == [p for p in zip(ids, full, strict=True) if p[0] not in first]
    with pytest.raises(RowError, match="leaves some out"):
        weighed({"input_ids": ids, "weights": weights}, train_on="all")


def test_templated_text_is_the_chat_it_was_written_from(template: Template) -> None:
    messages = [SYSTEM, ASK, SAY, MORE, SAY_MORE]
    text = template.render(messages)
    found = document(template, {"text": text}, "templated_text")
    assert learned(found) == learned(document(template, {"messages": messages}))
    refused = fault({"text": text}, "text", template)
    assert refused.kind == "special-token-in-content"
    assert "templated_text" in (refused.hint or "")
    assert fault({"text": "plain"}, "templated_text", template).kind == "no-turn-marker"
    cut = text[: text.rindex("so")]
    assert fault({"text": cut}, "templated_text", template).kind == "no-stop-token"


def test_long_rows_keep_whole_answers(template: Template) -> None:
    messages = [ASK, SAY, MORE, SAY_MORE]
    text = template.render(messages)
    first = document(template, {"messages": [ASK, SAY]})
    limit = first.tokens + 1
    cut = render(template, {"text": text}, "templated_text", max_length=limit, too_long="truncate")
    assert cut.document is not None
    assert cut.status == "truncated"
    assert learned(cut.document) == learned(first)
    with pytest.raises(RowError, match="longest path"):
        render(template, {"text": text}, "templated_text", max_length=limit)


def test_train_on_chooses_among_marked_runs(template: Template) -> None:
    stop = min(template.stop_ids)
    ids = [*range(15, 24), stop]
    mask = [0, 1, 1, 0, 0, 1, 0, 0, 1, 1]
    row = {"input_ids": ids, "loss_mask": mask}

    def targets(train_on: Any) -> list[int]:
        found = render(template, row, train_on=train_on).document
        assert found is not None
        return learned(found)[1]

    assert targets("auto") == [16, 17, 20, 23, stop]
    assert targets("last") == [23, stop]
    assert targets("all") == ids[1:]
    with pytest.raises(RowError, match="names roles"):
        targets(["user"])
    assert fault({"input_ids": ids[:-1], "loss_mask": mask[:-1]}, "tokens", template).kind == (
        "no-stop-token"
    )


def test_formats_can_be_named_and_mixed_rows_are_found(template: Template, tmp_path: Path) -> None:
    rows = [PAIRS["sharegpt"][0], {"messages": [ASK, SAY]}]
    source = Source("rows", path=write_jsonl(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match="mixed-format"):
        prepare([source], template, max_length=None)
    both = [
        Source("a", rows=rows[:1], format="sharegpt"),
        Source("b", rows=rows[1:], format="messages"),
    ]
    assert prepare(both, template, max_length=None).formats == {"a": "sharegpt", "b": "messages"}
    assert set(FORMATS) > {"sharegpt", "alpaca", "preference", "segments", "tokens"}


def test_nulls_that_columnar_files_fill_in_are_absent(template: Template, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    def tool(name: str, **properties: Any) -> dict[str, Any]:
        parameters = {"type": "object", "properties": properties}
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    rows = [
        {"messages": [ASK, SAY], "tools": [tool("add", a={"type": "number"})]},
        {"messages": [ASK, SAY], "tools": [tool("cut", b={"type": "string", "enum": ["x"]})]},
    ]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    filled = parquet.read_table(path).to_pylist()
    assert filled[0]["tools"][0]["function"]["parameters"]["properties"]["b"] is None
    from tunesmith.data.sources.sources import read_rows

    assert [row.values for row in read_rows(Source("p", path=path))] == rows


def test_convert_writes_counts_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [PAIRS["sharegpt"][0]] * 3
    data = write_jsonl(tmp_path / "in.jsonl", [*good, {"conversations": "x"}])
    out = tmp_path / "out.jsonl"
    assert command(["convert", str(data), str(out)]) == 2
    said = capsys.readouterr().err
    for part in ("1 of 4 rows", "in.jsonl:3", "--bad-rows drop"):
        assert part in said
    assert not out.exists()
    assert command(["convert", str(data), str(out), "--bad-rows", "drop"]) == 0
    assert "left out 1 bad rows" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == ["so"] * 3
    assert command(["convert", str(data), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    for odd in (["--to", "text"], ["--bad-rows", "keep"], ["--format", "nope"]):
        assert command(["convert", str(data), str(tmp_path / "new.jsonl"), *odd]) == 2
    assert command(["convert", str(data), str(tmp_path / "new.txt")]) == 2
    capsys.readouterr()


def test_convert_maps_columns_and_writes_parquet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "in.jsonl", [{"q": "2+2?", "a": "4", "id": 1}])
    out = tmp_path / "out.parquet"
    columns = "{prompt: q, completion: a}"
    assert command(["convert", str(data), str(out), "--columns", columns]) == 0
    from pyarrow import parquet

    assert parquet.read_table(out).to_pylist() == [{"messages": [ASK, SAY], "id": 1}]
    back = tmp_path / "back.jsonl"
    assert command(["convert", str(out), str(back), "--to", "prompt_completion"]) == 0
    assert json.loads(back.read_text()) == {"prompt": "2+2?", "completion": "4", "id": 1}
    capsys.readouterr()


def test_rows_of_any_format_are_held_out_by_what_they_teach() -> None:
    rows = [values for values, _ in PAIRS.values()]
    rows += [{**rows[0], "conversations": rows[0]["conversations"][:2]}]
    rows += [{"prompt": "2+2?", "chosen": "5", "rejected": "5"}]
    rows += [{"input_ids": [1, 2], "labels": labels} for labels in ([1, 2], [-100, 2])]
    rows += [{"segments": [{"text": text, "train": True}]} for text in "ab"]
    digests = {row_digest(row) for row in rows}
    assert len(digests) == len({json.dumps(row, sort_keys=True) for row in rows})
    assert row_digest({**rows[0], "id": 1}) == row_digest(rows[0])


def test_what_is_no_chat_is_not_converted() -> None:
    for values in ({"text": "x"}, {"input_ids": [1]}, {"segments": [{"text": "x", "train": True}]}):
        with pytest.raises(RowError, match="no chat"):
            convert_row(values, format=detect_format(values) or "", to="messages")
    with pytest.raises(RowError, match="2 answers"):
        convert_row({"messages": [ASK, SAY, MORE, SAY_MORE]}, format="messages",
                    to="prompt_completion")  # fmt: skip
