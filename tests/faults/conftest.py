"""A model and rows, a run that nothing disturbed, and the processes that train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Place, records
from forked import Server

from tiny import chat_rows, tiny_folder, write_jsonl


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    folder = tmp_path_factory.mktemp("faults")
    tiny_folder(folder / "model", num_hidden_layers=2)
    write_jsonl(folder / "rows.jsonl", chat_rows(14))
    write_jsonl(folder / "eval.jsonl", chat_rows(17)[14:])
    server = Server(folder)
    yield Place(folder, server)
    server.close()


@pytest.fixture(scope="session")
def undisturbed(place: Place) -> Path:
    run = place.folder / "undisturbed"
    done = place.run(run)
    assert done.code == 0, done.said
    assert len(records(run, "train")) == 8  # 14 rows, twice, by 4
    return run
