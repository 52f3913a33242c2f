"""Files of a run that are cut, forged or of other types: an error or the checkpoint before, and no
traceback; what can be made anew is.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_runs import Place, assert_same_run

from tunesmith.checkpoint.folder import find_damage


@pytest.fixture(scope="module")
def killed(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return place.killed_after(tmp_path_factory.mktemp("forged") / "run", 3)


def forge(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change state.json and write a manifest that fits it."""
    state = json.loads((checkpoint / "state.json").read_text())
    text = json.dumps(change(state)).encode()
    (checkpoint / "state.json").write_bytes(text)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["state.json"] = {
        "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(),
    }  # fmt: skip
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


STATES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a step of the far future": lambda s: {**s, "step": 10**9},
    "a step as text": lambda s: {**s, "step": "3"},
    "a list": lambda s: [],
    "no meta": lambda s: {**s, "meta": None},
    "no generators": lambda s: {**s, "rng": {}},
    "tokens as text": lambda s: {**s, "meta": {**s["meta"], "micro_tokens": "many"}},
    "tokens below 0": lambda s: {**s, "meta": {**s["meta"], "micro_tokens": -1}},
    "a best of the future": lambda s: {**s, "meta": {**s["meta"], "best": {"step": 9, "nll": 0.0}}},
    "a best that is a list": lambda s: {**s, "meta": {**s["meta"], "best": [1]}},
    "owed as text": lambda s: {**s, "meta": {**s["meta"], "owed_evaluation": "yes"}},
}


@pytest.mark.parametrize("kind", STATES)
def test_forged_state_is_damage(kind: str, killed: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-3"
    shutil.copytree(killed / "checkpoints" / "step-3", checkpoint)
    assert find_damage(checkpoint) is None
    forge(checkpoint, lambda state: state)
    assert find_damage(checkpoint) is None  # the test's own test: forging alone is not seen
    forge(checkpoint, STATES[kind])
    assert "state.json" in str(find_damage(checkpoint))


def test_run_goes_on_from_the_checkpoint_before_a_forged_one(
    killed: Path, place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    forge(out / "checkpoints" / "step-3", STATES["a step of the far future"])
    done = place.resume(out)
    assert done.code == 0, done.said
    assert "its step is 1000000000" in done.said
    assert "resume: from step 2" in done.said
    assert_same_run(out, undisturbed)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "null",
        "",
        '{"asked": 1}',
        '{"asked": {}, "template": {}, "data": {}, "eval": 3}',
    ],
)
def test_forged_machine_file_is_an_error(
    text: str, killed: Path, place: Place, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    (out / "machine.json").write_text(text)
    for words in (["resume", str(out)], ["replay", str(out), "--step", "1"]):
        done = place.server.run(words)
        assert done.wait() == 2, done.said
        assert "Traceback" not in done.said
        assert str(out / "machine.json") in done.said


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"sources": 3}'])
def test_ledger_that_is_damaged_is_written_again(
    text: str | None, killed: Path, place: Place, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(killed, out)
    good = json.loads((out / "ledger.json").read_text())
    if text is None:
        (out / "ledger.json").unlink()
    else:
        (out / "ledger.json").write_text(text)
    done = place.resume(out)
    assert done.code == 0, done.said
    assert "ledger.json was damaged" in done.said
    assert json.loads((out / "ledger.json").read_text()) == good
    assert_same_run(out, undisturbed)
