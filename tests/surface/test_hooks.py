"""The git hook for commit subjects: a conventional prefix, at most 72 characters."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

HOOK = Path(__file__).parents[2] / ".githooks" / "commit-msg"


@pytest.mark.parametrize(
    ("subject", "code"),
    [
        ("feat: read Arrow streams", 0),
        ("fix(export): keep the stop tokens", 0),
        ("Merge branch 'main'", 0),
        ("read Arrow streams", 1),
        ("feat:", 1),
        ("docs: " + "x" * 66, 0),
        ("docs: " + "x" * 67, 1),
    ],
)
def test_subjects(tmp_path: Path, subject: str, code: int) -> None:
    message = tmp_path / "message"
    message.write_text(f"{subject}\n\n{'a long body ' * 20}\n")
    done = subprocess.run(["sh", str(HOOK), str(message)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert bool(done.stderr) == bool(code)
