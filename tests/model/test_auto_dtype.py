"""`model.dtype: auto` on CPUs with and without bfloat16 in hardware, wherever the tests run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tunesmith
from tunesmith.model.ops.bf16_upcast import needs_upcast
from tunesmith.model.ops.dtype import choose_dtype

HOOK = Path(__file__).parent.parent / "auto_dtype"
SHOW = """
import torch
from tunesmith.model.ops.bf16_upcast import needs_upcast
from tunesmith.model.ops.dtype import choose_dtype
print(choose_dtype("auto", "cpu").dtype, needs_upcast(torch.ones(1, dtype=torch.bfloat16)))
"""


@pytest.mark.parametrize(
    ("forced", "said"),
    [("bfloat16", "torch.bfloat16 False"), ("float32", "torch.float32 True")],
)
def test_a_process_of_the_tests_computes_as_forced(forced: str, said: str) -> None:
    paths = [str(HOOK), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", SHOW], capture_output=True, text=True, check=True,
        env={**os.environ, "TUNESMITH_TEST_DTYPE": forced, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.stdout.strip() == said


@pytest.mark.any_dtype
def test_this_process_computes_as_forced() -> None:
    forced = os.environ.get("TUNESMITH_TEST_DTYPE")
    chosen = choose_dtype("auto", "cpu").dtype
    assert chosen == getattr(torch, forced) if forced else chosen in (torch.float32, torch.bfloat16)
    assert needs_upcast(torch.ones(1, dtype=torch.bfloat16)) is (chosen == torch.float32)


@pytest.mark.any_dtype
@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float32"])
def test_a_run_takes_the_dtype_of_this_cpu_or_the_one_asked_for(
    llama_folder: Path, chats: Path, tmp_path: Path, asked: str
) -> None:
    wanted = choose_dtype(asked, "cpu").dtype
    run = tunesmith.train(
        model={"name": str(llama_folder), "dtype": asked}, data=str(chats), out=tmp_path / "run",
        batch=4, train={"steps": 2}, progress=False,
    )  # fmt: skip
    assert {weight.dtype for weight in run.model.parameters()} == {wanted}
    machine = json.loads((run.folder / "machine.json").read_text())
    assert machine["chosen"]["dtype"] == str(wanted).removeprefix("torch.")
