"""What an import may load: nothing heavy before a command needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "pyarrow", "datasets", "pandas")


def loaded(code: str) -> set[str]:
    """The heavy packages that the code has loaded in a fresh interpreter."""
    report = f"import sys\n{code}\nprint('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_the_probe_sees_a_heavy_module() -> None:
    assert "pyarrow" in loaded("import pyarrow")


@pytest.mark.parametrize(
    "code",
    [
        "import tunesmith",
        "import tunesmith.config.read",
        "from tunesmith.cli.app import run; run(['--help'])",
        "from tunesmith.cli.app import run; run(['schema'])",
        "from tunesmith.cli.app import run; run(['init', '--help'])",
        "from tunesmith.cli.app import run; run(['--learning_rate', '3'])",
    ],
)
def test_light_things_load_nothing_heavy(code: str) -> None:
    assert loaded(code) == set()


def test_importing_the_package_does_not_load_the_recipe_reader() -> None:
    code = "import sys, tunesmith; print('pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
