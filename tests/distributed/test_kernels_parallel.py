"""Fused kernels where ranks copy, spread or divide a model: what is learned stays the same, and
they are what computes it. A stand-in for Liger's, in plain torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gang import assert_same_learning, run_groups
from tiny import chat_inputs

STEPS = 4
COMMON = [
    f"train.steps={STEPS}", "model.dtype=float32", "optim.lr=0.003", "device.micro_tokens=96",
    "batch.documents=6",
]  # fmt: skip
KINDS = {
    "copied": [],
    "spread": ["device.shard=full"],
    "divided": ["device.tensor_parallel=2"],
    "shared": ["device.context_parallel=2"],
}
PRELUDE = """
import sys
sys.path[:0] = {paths!r}
from dataclasses import replace
from tunesmith.model.kernels import provider
from test_kernels import RIGHT, norm

def told(input, *given):
    if input.shape[1] not in (67, 33_000):  # of a trial
        open({out!r} + f".called-{{rank}}", "a").close()
    return norm(input, *given)

provider.find_spec = lambda _: True
provider._liger = lambda: replace(RIGHT, norm=told)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    inputs = chat_inputs(folder, held_out=4)
    tests = Path(__file__).resolve().parents[1]
    paths = [str(tests), str(tests / "model")]
    groups = [(1, [{**inputs, "out": str(folder / "alone"), "overrides": COMMON}])]
    for name, options in KINDS.items():
        out = str(folder / name)
        overrides = [*COMMON, *options, "device.kernels=liger"]
        prelude = PRELUDE.format(paths=paths, out=out)
        job = {**inputs, "out": out, "overrides": overrides, "prelude": prelude}
        groups.append((2, [job]))
    codes, said = run_groups(groups)
    assert not any(code for group in codes for code in group), said
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_learn_the_same(kind: str, runs: Path) -> None:
    assert_same_learning(runs / "alone", runs / kind, steps=STEPS)
    chosen = json.loads((runs / kind / "machine.json").read_text())["chosen"]
    assert chosen["kernels"] == "Plain 1 for 5 of 5 norms and 2 of 2 gated units"
    assert all((runs / f"{kind}.called-{rank}").exists() for rank in range(2))
