"""Compiled layers where ranks copy a model or share its tokens, by torch's own interpreter of
graphs: what is learned stays the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gang import assert_same_learning, run_groups
from tiny import chat_inputs

pytestmark = pytest.mark.slow
STEPS = 4
COMMON = [
    f"train.steps={STEPS}", "model.dtype=float32", "optim.lr=0.003", "device.micro_tokens=96",
    "batch.documents=6",
]  # fmt: skip
KINDS = {"copied": [], "shared": ["device.context_parallel=2"]}
PRELUDE = """
from tunesmith.model.compile import compile_layers
from tunesmith.build import compile as assembled
assembled.compile_layers = lambda layers, **_: compile_layers(layers, backend="eager")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    inputs = chat_inputs(folder, held_out=4)
    groups = [(1, [{**inputs, "out": str(folder / "alone"), "overrides": COMMON}])]
    for name, options in KINDS.items():
        overrides = [*COMMON, *options, "device.compile=layers"]
        job = {**inputs, "out": str(folder / name), "overrides": overrides, "prelude": PRELUDE}
        groups.append((2, [job]))
    codes, said = run_groups(groups)
    assert not any(code for group in codes for code in group), said
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_learn_the_same(kind: str, runs: Path) -> None:
    assert_same_learning(runs / "alone", runs / kind, steps=STEPS)
    chosen = json.loads((runs / kind / "machine.json").read_text())["chosen"]
    assert chosen["compile"].startswith("2 layers, tried on ")
