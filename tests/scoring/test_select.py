"""`tunesmith select`: each rule against a plain reading of it, and a ledger that adds up."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.cli.app import run
from tunesmith.errors import RecipeError
from tunesmith.scoring.rows import RowScore
from tunesmith.scoring.rules import parse_rule
from tunesmith.scoring.table import ScoredSource, read_scores, write_scores

COLUMNS = ["ifd", "loss", "target_tokens"]


def score_file(
    path: Path, data: Path, values: list[tuple[float | None, float | None, int]], **source
) -> Path:
    """Scores of a file: (loss, ifd, target tokens) of each row; a row without loss was dropped."""
    name = str(data)
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    rows = [
        RowScore(name, row, "dropped", "no-targets", 0)
        if loss is None
        else RowScore(name, row, "trained", None, tokens, tokens, loss, math.exp(loss), ifd=ifd)
        for row, (loss, ifd, tokens) in enumerate(values)
    ]
    found = ScoredSource(digest, len(rows), "messages", source.get("columns"))
    write_scores(path, rows, sources={name: found}, about={"model": "M"})
    return path


def data_file(path: Path, count: int, text=lambda row: f"row number {row}") -> Path:
    lines = [
        {"id": row, "prompt": "?", "completion": text(row), "extra": 0.1} for row in range(count)
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def selected(
    folder: Path, scores: list[Path], data: list[Path], *rules: str
) -> tuple[list[int], dict]:
    """Row ids that are kept, and the ledger."""
    out = folder / "new.jsonl"
    words = [*map(str, scores), "--out", str(out), "--overwrite"]
    for path in data:
        words += ["--data", str(path)]
    for rule in rules:
        words += ["--keep", rule]
    assert run(["select", *words]) == 0
    rows = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    ledger = json.loads((folder / "new.ledger.json").read_text())
    assert ledger["out"]["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    return [row["id"] for row in rows], ledger


VALUES = [
    (1.0, 0.5, 10),
    (2.0, None, 20),
    (0.5, 1.2, 30),
    (None, None, 0),
    (2.0, 0.9, 5),
    (3.0, 0.9, 7),
]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (["top 2 by loss"], [1, 5]),  # of equals the earlier
        (["bottom 2 by loss"], [0, 2]),
        (["top 40% by ifd"], [2, 4]),
        (["top 1% by ifd"], [2]),
        (["loss between 1 and 2"], [0, 1, 4]),
        (["loss between 25% and 75%"], [0, 1, 4]),
        (["ifd < 1"], [0, 4, 5]),
        (["ifd<=0.5"], [0]),
        (["loss > 2.0"], [5]),
        (["loss >= 2.0"], [1, 4, 5]),
        (["budget 35"], [0, 1]),  # the third would go over, and nothing behind it slips in
        (["budget 1_000"], [0, 1, 2, 4, 5]),
        (["budget 42 by loss"], [1, 4, 5, 0]),
        (["ifd < 1", "top 1 by loss"], [5]),
        (["top 1 by loss", "ifd < 1"], [5]),
        (["bottom 1 by loss", "ifd > 1"], [2]),
        (["top 2 by loss", "budget 7"], []),
    ],
)
def test_rules_keep_what_they_say(rules: list[str], kept: list[int], tmp_path: Path, capsys):
    data = data_file(tmp_path / "data.jsonl", len(VALUES))
    scores = score_file(tmp_path / "s.parquet", data, VALUES)
    if not kept:
        words = ["select", str(scores), "--data", str(data), "--out", str(tmp_path / "n.jsonl")]
        assert run([*words, *(w for rule in rules for w in ("--keep", rule))]) == 2
        assert "none of the 6 rows" in capsys.readouterr().err
        assert not (tmp_path / "n.jsonl").exists()
        return
    found, ledger = selected(tmp_path, [scores], [data], *rules)
    assert found == sorted(kept)
    assert ledger["data"][0]["left_out"]["no score: no-targets"] == [3]


def test_rows_are_as_they_were_and_in_their_order(tmp_path: Path):
    data = tmp_path / "data.jsonl"
    rows = [
        {"id": n, "q": f"é \u2028 {n}", "a": [1e-7, 10**20, None, {"b": True}]} for n in range(4)
    ]
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    values = [(float(n % 3), 0.1, 1) for n in range(4)]
    columns = {"prompt": "q", "completion": "a"}
    scores = score_file(tmp_path / "s.parquet", data, values, columns=columns)
    selected(tmp_path, [scores], [data], "top 3 by loss")
    written = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().split("\n")[:-1]]
    assert written == rows[:3]


def test_exact_duplicates_keep_the_first_whatever_their_other_columns(tmp_path: Path):
    data = data_file(tmp_path / "data.jsonl", 5, lambda row: "same" if row in (1, 3) else str(row))
    scores = score_file(tmp_path / "s.parquet", data, [(1.0, 1.0, 1)] * 5)
    assert selected(tmp_path, [scores], [data], "dedup")[0] == [0, 1, 2, 4]


def test_near_duplicates_keep_the_first(tmp_path: Path):
    base = [f"word{n}" for n in range(60)]

    def text(row: int) -> str:
        words = list(base) if row in (0, 2, 3) else [f"other{row}x{n}" for n in range(60)]
        if row == 2:
            words[30] = "changed"
        if row == 3:
            words[10:50] = [f"new{n}" for n in range(40)]
        return " ".join(words)

    data = data_file(tmp_path / "data.jsonl", 5, text)
    scores = score_file(tmp_path / "s.parquet", data, [(1.0, 1.0, 1)] * 5)
    assert selected(tmp_path, [scores], [data], "dedup near")[0] == [0, 1, 3, 4]
    assert selected(tmp_path, [scores], [data], "dedup near 0.99")[0] == [0, 1, 2, 3, 4]


def test_files_of_several_sources_are_one_pool(tmp_path: Path):
    a, b = data_file(tmp_path / "a.jsonl", 3), data_file(tmp_path / "b.jsonl", 4, lambda n: f"b{n}")
    first = score_file(tmp_path / "a.parquet", a, [(5.0, 1, 1), (1.0, 1, 1), (4.0, 1, 1)])
    second = score_file(tmp_path / "b.parquet", b, [(0.0, 1, 1), (6.0, 1, 1), (3.0, 1, 1)])
    found, ledger = selected(tmp_path, [first, second], [b, a], "top 3 by loss")
    assert found == [1, 0, 2]  # b first, as it was given
    assert [part["kept"] for part in ledger["data"]] == [[1], [0, 2]]
    assert ledger["data"][0]["left_out"]["not in the scores"] == [3]


ROWS = st.lists(
    st.tuples(
        st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5])),
        st.one_of(st.none(), st.floats(0.1, 2.0)),
        st.integers(1, 50),
        st.sampled_from(["a", "b", "c", "a long answer with more than a few words in it"]),
    ),
    min_size=1,
    max_size=20,
)
RULES = st.lists(
    st.sampled_from(
        [
            "top 50% by ifd", "bottom 5 by loss", "loss between 10% and 90%", "ifd < 1", "dedup",
            "dedup near 0.7", "budget 200", "budget 100 by ifd", "loss between 0 and 2", "dedup",
        ]
    ),
    min_size=1,
    max_size=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, rules=RULES)
def test_the_ledger_adds_up_for_any_rules(rows, rules):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data_file(folder / "data.jsonl", len(rows), lambda row: rows[row][3])
        scores = score_file(folder / "s.parquet", data, [row[:3] for row in rows])
        words = ["select", str(scores), "--data", str(data), "--out", str(folder / "new.jsonl")]
        for rule in rules:
            words += ["--keep", rule]
        code = run(words)
        if code == 2:
            assert not (folder / "new.jsonl").exists()
            return
        ledger = json.loads((folder / "new.ledger.json").read_text())
        ids = [json.loads(line)["id"] for line in (folder / "new.jsonl").read_text().splitlines()]
    (part,) = ledger["data"]
    assert part["kept"] == ids == sorted(ids)
    everything = sorted([*ids, *(row for found in part["left_out"].values() for row in found)])
    assert everything == list(range(len(rows)))
    totals = ledger["totals"]
    held = [row[2] for row in rows if row[0] is not None]
    assert totals["rows"] == len(rows) == totals["rows_kept"] + totals["rows_left_out"]
    assert totals["target_tokens"] == sum(held)
    assert totals["target_tokens_kept"] == sum(rows[row][2] for row in ids)
    assert sum(step["rows_left_out"] for step in ledger["steps"]) == totals["rows_left_out"]
    kept = totals["target_tokens"] - sum(s["target_tokens_left_out"] for s in ledger["steps"])
    assert kept == totals["target_tokens_kept"]


def test_data_that_changed_is_refused(tmp_path: Path, capsys):
    data = data_file(tmp_path / "data.jsonl", 3)
    scores = score_file(tmp_path / "s.parquet", data, [(1.0, 1.0, 1)] * 3)
    words = ["select", str(scores), "--out", str(tmp_path / "new.jsonl"), "--keep", "dedup"]
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(data.read_bytes())
    assert run([*words, "--data", str(moved)]) == 0  # it is the contents that count
    data.write_text(data.read_text().replace("number 2", "number two"))
    assert run([*words, "--overwrite", "--data", str(data)]) == 2
    assert "not those that were scored" in capsys.readouterr().err
    other = data_file(tmp_path / "other.jsonl", 2)
    assert run([*words, "--overwrite", "--data", str(other)]) == 2
    assert "no scores of it" in capsys.readouterr().err
    assert run([*words, "--overwrite", "--data", str(moved), "--data", str(moved)]) == 2
    assert run(["select", str(scores), *words[1:], "--overwrite", "--data", str(moved)]) == 2
    assert "two lines" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "part"),
    [
        ("best rows", "rules are"),
        ("top 10 by lss", "did you mean loss?"),
        ("top 110% by loss", "at most 100%"),
        ("top 1.5 by loss", "whole number"),
        ("loss between 5% and 2", "quantile and the other"),
        ("loss between 3 and 2", "wrong way round"),
        ("dedup near 1.5", "to 1"),
        ("dedup near 0.3", "missed"),
        ("loss = 3", "rules are"),
    ],
)
def test_what_is_no_rule_is_said(rule: str, part: str):
    with pytest.raises(RecipeError) as caught:
        parse_rule(rule, COLUMNS)
    assert part in str(caught.value)


def test_wrong_use_is_refused_and_writes_nothing(tmp_path: Path, capsys):
    data = data_file(tmp_path / "data.jsonl", 2)
    scores = score_file(tmp_path / "s.parquet", data, [(1.0, 1.0, 1)] * 2)
    out = str(tmp_path / "new.jsonl")
    good = ["select", str(scores), "--data", str(data), "--keep", "dedup"]
    before = data.read_bytes()
    for words in (
        ["select", str(scores), "--data", str(data), "--out", out],
        ["select", str(scores), "--keep", "dedup", "--out", out],
        ["select", str(data), "--data", str(data), "--keep", "dedup", "--out", out],
        ["select", str(tmp_path / "none"), "--data", str(data), "--keep", "dedup", "--out", out],
        [*good, "--out", str(tmp_path / "new.csv")],
        [*good, "--out", str(data)],
        [*good, "--out", str(data), "--overwrite"],
    ):
        assert run(words) == 2, words
        assert "error:" in capsys.readouterr().err
    assert data.read_bytes() == before
    assert not Path(out).exists()


def test_a_score_file_reads_back_as_it_was_written(tmp_path: Path):
    data = data_file(tmp_path / "data.jsonl", len(VALUES))
    read = read_scores(score_file(tmp_path / "s.parquet", data, VALUES))
    assert read.row.tolist() == list(range(6))
    assert read.about == {"model": "M"}
    expected = [np.nan if loss is None else loss for loss, _, _ in VALUES]
    assert np.array_equal(read.numbers["loss"], expected, equal_nan=True)


def test_a_column_of_ones_own_can_be_used(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    data = data_file(tmp_path / "data.jsonl", 3)
    scores = score_file(tmp_path / "s.parquet", data, [(1.0, 1.0, 1)] * 3)
    table = parquet.read_table(scores)
    parquet.write_table(table.append_column("taste", pa.array([1, 3, 2])), scores)
    assert selected(tmp_path, [scores], [data], "top 2 by taste")[0] == [1, 2]


def test_rows_of_other_kinds_of_file_are_written_as_json_lines(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    data = tmp_path / "data.parquet"
    rows = [{"id": n, "prompt": "?", "completion": f"{n} é"} for n in range(3)]
    parquet.write_table(pa.Table.from_pylist(rows), data)
    scores = score_file(tmp_path / "s.parquet", data, [(3.0, 1.0, 1), (1.0, 1.0, 1), (2.0, 1.0, 1)])
    selected(tmp_path, [scores], [data], "top 2 by loss")
    written = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert written == [rows[0], rows[2]]


def test_what_score_writes_select_reads(llama_folder: Path, chats: Path, tmp_path: Path):
    scores, out = tmp_path / "s.parquet", tmp_path / "new.jsonl"
    words = ["score", "--model", str(llama_folder), "--data", str(chats), "--out", str(scores)]
    assert run(words) == 0
    words = ["select", str(scores), "--data", str(chats), "--out", str(out)]
    assert run([*words, "--keep", "bottom 5 by loss"]) == 0
    read = read_scores(scores)
    best = sorted(np.argsort(read.numbers["loss"], kind="stable")[:5].tolist())
    lines = chats.read_text().splitlines()
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        json.loads(lines[row]) for row in best
    ]
