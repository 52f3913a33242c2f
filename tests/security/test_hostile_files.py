"""Small files that would become large, deep ones, and numbers without end: errors of ours."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tiny import chat_rows, tiny_tokenizer
from tunesmith.cli.app import run
from tunesmith.data.sources.readers import json as json_reader
from tunesmith.data.sources.readers import rows as raw
from tunesmith.data.sources.sources import Source, read_rows
from tunesmith.errors import DataError

GOOD = json.dumps(chat_rows(1)[0]).encode()
DEEP = b"[" * 100_000
BOMBS = {
    "deep list": DEEP + b"]" * 100_000,
    "deep list without end": DEEP,
    "deep object": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep as Python allows": b'{"messages":' + b"[" * 900 + b"]" * 900 + b"}",
    "deep in a row": b'{"text": "x", "more": ' + b"[" * 900 + b"]" * 900 + b"}",
    "deep tools": GOOD[:-1] + b', "tools": ' + b'[{"a":' * 400 + b"1" + b"}]" * 400 + b"}",
    "deep arguments": GOOD[:-1] + b', "template_kwargs": ' + b'{"a":' * 900 + b"1" + b"}" * 901,
    "long number": b'{"text": ' + b"9" * 1_000_000 + b"}",
    "long exponent": b'{"text": 1e' + b"9" * 1000 + b"}",
    "not a number": b'{"text": NaN}',
    "infinite weight": b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
    b'"content": "b", "weight": Infinity}]}',
    "many keys": b"{" + b",".join(b'"%d": 1' % n for n in range(100_000)) + b"}",
    "half a pair": b'{"text": "\\ud800"}',
    "zeros": b"\x00" * 100_000,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_in_an_error_or_a_bad_row(
    name: str, ending: str, model: Path, tmp_path: Path, capsys
) -> None:
    data = tmp_path / f"rows.{ending}"
    data.write_bytes(b"\n".join([GOOD, BOMBS[name], GOOD]) if ending == "jsonl" else BOMBS[name])
    words = ["preview", "--model", str(model), "--data", str(data), "--json", "--rows", "9"]
    for more in ([], ["data.bad_rows=drop"]):
        assert run([*words, *more]) in (0, 2)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        for line in shown.out.splitlines():
            json.loads(line)


@pytest.mark.parametrize("ending", ["jsonl", "csv", "json"])
def test_line_that_never_ends_is_not_read_on(ending: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(raw, "LONGEST", 1 << 21)
    monkeypatch.setattr(json_reader, "LONGEST", 1 << 21)
    data = tmp_path / f"rows.{ending}.gz"
    opening = b"text\n" if ending == "csv" else b'{"text": "'
    with gzip.open(data, "wb", compresslevel=1) as file:
        file.write(opening)
        for _ in range(64):
            file.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match="is longer than 2 MiB"):
        list(read_rows(Source("rows", path=data)))


def test_long_row_below_the_limit_is_a_row(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"text": "word " * 1_000_000}) + "\n")
    (row,) = read_rows(Source("rows", path=data))
    assert row.values is not None
    assert len(row.values["text"]) == 5_000_000
