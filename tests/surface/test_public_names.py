"""The public names, what they take and what they hold: changed on purpose only."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import tunesmith

NAMES = [
    "InputError",
    "InterruptedRun",
    "Recipe",
    "Run",
    "RunError",
    "TunesmithError",
    "read_recipe",
    "resume",
    "train",
]
TRAIN = {
    "recipe": None,
    "model": None,
    "data": None,
    "eval": None,
    "out": None,
    "resume": False,
    "overwrite": False,
    "tokenizer": None,
    "overrides": (),
    "progress": True,
    "sections": inspect.Parameter.empty,
}
RUN = ["folder", "model_folder", "steps", "metrics", "model", "tokenizer"]


def test_public_names_are_frozen_sorted_and_there() -> None:
    assert tunesmith.__all__ == NAMES == sorted(NAMES)
    assert all(getattr(tunesmith, name).__doc__ for name in NAMES)
    assert set(NAMES) <= set(dir(tunesmith))


def test_nothing_else_looks_public() -> None:
    code = "import tunesmith; print(*[n for n in vars(tunesmith) if not n.startswith('_')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {
        "annotations",
        "errors",
        "display",
        "redact",
        "TYPE_CHECKING",
        "Any",
        "version",
        "ModuleType",
        "sys",
    }
    assert set(done.stdout.split()) - modules <= set(NAMES)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        tunesmith.trian  # noqa: B018


def test_arguments_of_train() -> None:
    parameters = inspect.signature(tunesmith.train).parameters
    assert {name: p.default for name, p in parameters.items()} == TRAIN
    kinds = [p.kind for p in parameters.values()]
    assert kinds[0] == inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds[1:-1]) == {inspect.Parameter.KEYWORD_ONLY}
    assert kinds[-1] == inspect.Parameter.VAR_KEYWORD


def test_arguments_of_resume() -> None:
    parameters = inspect.signature(tunesmith.resume).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "run": inspect.Parameter.empty,
        "overrides": (),
        "changed_data": False,
        "progress": True,
    }
    assert parameters["overrides"].kind == inspect.Parameter.KEYWORD_ONLY


def test_a_run_says_these_things() -> None:
    assert [field.name for field in dataclasses.fields(tunesmith.Run)] == RUN
    assert tunesmith.Run.__dataclass_params__.frozen  # type: ignore[attr-defined]


def test_errors_are_one_family() -> None:
    for error in (tunesmith.InputError, tunesmith.RunError, tunesmith.InterruptedRun):
        assert issubclass(error, tunesmith.TunesmithError)
    assert tunesmith.InputError.exit_code == 2
    assert tunesmith.RunError.exit_code == 1


def test_the_import_loads_no_torch() -> None:
    code = "import sys, tunesmith; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
