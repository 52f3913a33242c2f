"""P4 over a run that was cut: the ledger is that of the undisturbed run, and what both legs learned
is what it says.
"""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.data.preprocess.ledger import Ledger, LedgerError
from tunesmith.errors import InterruptedRun
from tunesmith.run import resume, train

trainer_module = import_module("tunesmith.train.trainer")
BAD = [{"messages": "no list"}, {}, {"messages": [{"role": "user"}]}]
EPOCHS = 2


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and rows of which some are bad and some long."""
    folder = tmp_path_factory.mktemp("given")
    tiny_folder(folder / "model", num_hidden_layers=1)
    rows = chat_rows(10)
    rows[3:3] = BAD
    turns = [message for row in chat_rows(6) for message in row["messages"][-2:]]
    rows.insert(5, {"messages": turns})
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def started(place: Path, out: Path, chosen: dict[str, Any]) -> None:
    data = {
        "train": f"{place}/rows.jsonl", "bad_rows": "drop", "max_length": 90,
        "too_long": chosen["too_long"], "eval": chosen["eval"],
    }  # fmt: skip
    train(
        {"model": f"{place}/model", "data": data, "train": {"epochs": EPOCHS}},
        out=out, progress=False,
        overrides=[
            "batch.documents=3", "device.threads=1", "checkpoint.every=null", "optim.lr=1e-2",
            f"batch.packing={chosen['packing']}", f"device.cache={chosen['cache']}",
            *(["batch.pack_tokens=90"] if chosen["packing"] != "none" else []),
        ],
    )  # fmt: skip


def cut_after(place: Path, out: Path, chosen: dict[str, Any], steps: int) -> None:
    """A run that gets SIGTERM in its step of that number."""
    taken = 0
    step = trainer_module.train_step

    def then_a_signal(*arguments: Any, **keywords: Any) -> Any:
        nonlocal taken
        result = step(*arguments, **keywords)
        taken += 1
        if taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "train_step", then_a_signal)
        with pytest.raises(InterruptedRun):
            started(place, out, chosen)


def learned(out: Path) -> tuple[int, Counter[str]]:
    """Targets of all steps, and how often each row was learned from."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    targets = sum(line["target_tokens"] for line in lines if line["kind"] == "train")
    rows = pq.read_table(out / "rows.parquet").to_pylist()
    return targets, Counter(f"{row['source']}:{row['row']}" for row in rows)


@pytest.mark.parametrize(
    ("chosen", "steps"),
    [
        ({"too_long": "drop", "packing": "none", "eval": 2, "cache": True}, 1),
        ({"too_long": "truncate", "packing": "bfd", "eval": None, "cache": False}, 3),
        ({"too_long": "split", "packing": "none", "eval": None, "cache": True}, 2),
        ({"too_long": "drop", "packing": "wrapped", "eval": None, "cache": False}, 2),
    ],
)
def test_a_cut_run_has_the_ledger_of_a_whole_one(
    place: Path, tmp_path: Path, chosen: dict[str, Any], steps: int
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    started(place, whole, chosen)
    cut_after(place, cut, chosen, steps)
    resume(cut, progress=False)
    ledger = Ledger.load(cut / "ledger.json")
    ledger.check()
    assert ledger.to_dict() == Ledger.load(whole / "ledger.json").to_dict()
    totals = ledger.totals
    assert totals.rows_trained >= 6  # so that three steps of three are not all of it
    assert totals.rows_dropped + totals.rows_truncated > len(BAD)
    assert totals.rows_held_out == (chosen["eval"] or 0)
    targets, rows = learned(cut)
    assert (targets, rows) == learned(whole)
    if chosen["packing"] != "bfd":  # it leaves out what fits in no pack
        assert targets == EPOCHS * totals.tokens_trained
    if chosen["packing"] == "none":
        assert sum(rows.values()) == EPOCHS * (totals.rows_trained + totals.rows_truncated)


def test_rows_that_changed_are_in_the_ledger_of_what_went_on(place: Path, tmp_path: Path) -> None:
    chosen = {"too_long": "truncate", "packing": "none", "eval": None, "cache": False}
    write_jsonl(tmp_path / "rows.jsonl", chat_rows(8))
    (tmp_path / "model").symlink_to(place / "model")
    cut_after(tmp_path, tmp_path / "run", chosen, 1)
    before = Ledger.load(tmp_path / "run" / "ledger.json")
    write_jsonl(tmp_path / "rows.jsonl", [*chat_rows(8)[:6], *BAD])
    resume(tmp_path / "run", changed_data=True, progress=False)
    after = Ledger.load(tmp_path / "run" / "ledger.json")
    after.check()
    assert (before.totals.rows, before.totals.rows_dropped) == (8, 0)
    assert (after.totals.rows, after.totals.rows_dropped) == (6 + len(BAD), len(BAD))
    assert after.totals.rows_trained + after.totals.rows_truncated == 6


def test_a_ledger_that_lost_a_row_is_found(place: Path, tmp_path: Path) -> None:
    chosen = {"too_long": "drop", "packing": "none", "eval": None, "cache": False}
    cut_after(place, tmp_path / "run", chosen, 1)
    kept = json.loads((tmp_path / "run" / "ledger.json").read_text())
    source = next(iter(kept["sources"].values()))
    source["rows_dropped"] -= 1
    (tmp_path / "run" / "ledger.json").write_text(json.dumps(kept))
    with pytest.raises(LedgerError):
        Ledger.load(tmp_path / "run" / "ledger.json").check()
