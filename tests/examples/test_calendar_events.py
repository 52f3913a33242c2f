"""The example task is what it says: strict JSON, reproducible, and a test set nobody has seen."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "calendar_events.py"
KEYS = ["title", "day", "start", "minutes", "guest", "remind"]


@pytest.fixture(scope="module")
def task() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calendar_events", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_test_set_shares_no_sentence_and_no_event_with_training(task: ModuleType, tmp_path: Path):
    train, test = (_read(path) for path in task.write(tmp_path))
    assert (len(train), len(test)) == (320, 80)
    for key in ("prompt", "completion"):
        assert len({row[key] for row in train + test}) == 400


def test_completions_are_json_in_one_fixed_form(task: ModuleType, tmp_path: Path):
    for row in (row for path in task.write(tmp_path) for row in _read(path)):
        event = json.loads(row["completion"])
        assert list(event) == KEYS
        assert row["completion"] == json.dumps(event, separators=(",", ":"))
        assert re.fullmatch(r"1?\d:[0-5]\d [ap]m", event["start"])
        assert event["day"] in task.DAYS
        assert event["remind"] is None or event["remind"] > 0


def test_the_sentence_says_what_the_command_says(task: ModuleType, tmp_path: Path):
    """Read the sentence back with rules of this test's own."""
    for row in _read(task.write(tmp_path)[0]):
        event, sentence = json.loads(row["completion"]), row["prompt"]
        assert event["title"] in sentence.lower()
        assert event["day"].capitalize() in sentence
        guest = re.search(r" with (\w+)", sentence)
        assert event["guest"] == (guest and guest[1])
        assert (event["remind"] is not None) == ("emind" in sentence)
        time = re.search(r"at (\d+)(?::(\d\d))? ?(am|pm)", sentence)
        assert time is not None
        assert event["start"] == f"{time[1]}:{time[2] or '00'} {time[3]}"


def test_same_seed_same_bytes_other_seed_other_rows(task: ModuleType, tmp_path: Path):
    random.seed(1)
    first = [path.read_bytes() for path in task.write(tmp_path / "a")]
    random.seed(2)
    assert [path.read_bytes() for path in task.write(tmp_path / "b")] == first
    assert task.write(tmp_path / "c", seed=8)[0].read_bytes() != first[0]
