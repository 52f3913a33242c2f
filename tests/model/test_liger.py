"""Liger's own kernels against models' own modules, by Triton's interpreter, which runs them on a
CPU but knows no arithmetic in bfloat16; skipped where they are not installed. On a GPU (marked) as
runs use them.

    PYTHONPATH=FOLDER pytest -m slow tests/model/test_liger.py

FOLDER holds liger-kernel and triton, which a CPU build of torch comes without.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PRELUDE = """
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

# the interpreter hands a kernel plain floats and knows no libdevice
convert = interpreter._implicit_cvt

def as_tensor(value):
    if not isinstance(value, float):
        return convert(value)
    handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
    return tl.tensor(handle, tl.float32)

interpreter._implicit_cvt = as_tensor
import liger_kernel.ops.geglu, liger_kernel.ops.rms_norm
liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)
liger_kernel.ops.geglu.tanh = lambda x: 2 * tl.sigmoid(2 * x) - 1

import warnings
warnings.simplefilter("error", UserWarning)
from test_kernels import assert_same, install, learned, wrapped
from tunesmith.model.ops.activation_checkpointing import set_checkpointing
from tunesmith.model.kernels import find_liger, trial
kernels = find_liger(insist=True)
trial.ROWS = (37,)
"""
MODELS = """
family, dtype, bound = "{family}", torch.{dtype}, {bound}
model = wrapped(family, dtype)
if {frozen}:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" not in name)
expected = learned(model)
found = install(model, kernels)
assert found.norms == found.norms_seen == {norms}, found
assert found.units == found.units_seen == {units}, found
assert_same(model, expected, bound)
expected = learned(model)
for mode in {modes}:
    set_checkpointing(model.base, mode)
    loss, gradients = learned(model)
    assert loss == expected[0]
    assert all(torch.equal(gradients[name], wanted) for name, wanted in expected[1].items())
"""
MANY_ROWS = """
from tunesmith.model.kernels.trial import nearest, norm_variants
trial.ROWS = (67, 33_000)
module = wrapped("qwen3", torch.float16).decoder.layers[0].self_attn.q_norm
variants = norm_variants(kernels, "variance_epsilon")
variants = {name: variants[name] for name in ("0 gemma", "0 llama", "1 llama")}
device = torch.device("cpu")
assert nearest(module, variants, torch.float16, device)[1] == "0 llama"
"""
RUN = """
import tunesmith
from pathlib import Path
from tempfile import mkdtemp
from gang import losses
from tiny import chat_inputs

folder = Path(mkdtemp(dir={folder!r}))
given = chat_inputs(folder)
found = []
for name in ("torch", "liger", "again"):
    kernels = "device.kernels=" + name.replace("again", "liger")
    options = [kernels, "train.steps=2", "optim.lr=0.003", "batch.documents=2",
               "device.gradient_checkpointing=selective", "model.dtype=float32",
               "adapter=lora", "adapter.rank=4"]
    tunesmith.train(out=folder / name, overrides=options, progress=False, **given)
    found.append(losses(folder / name))
np.testing.assert_allclose(found[1], found[0], rtol=2e-5)
assert found[1] == found[2]
"""

interpreted = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("liger_kernel") is None or find_spec("triton") is None,
        reason="liger-kernel and triton are not installed",
    ),
]


def interpret(code: str) -> None:
    paths = [str(TESTS), str(TESTS / "model"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("family", "norms", "units", "dtype", "frozen"), [
    ("llama", 5, 2, "float32", False), ("llama", 5, 2, "float16", False),
    ("qwen3", 9, 2, "float32", True), ("gemma2", 9, 2, "float32", False),
    ("gemma2", 9, 2, "float16", True), ("gpt_oss", 5, 0, "float16", False),
])  # fmt: skip
class TestInterpreted:
    pytestmark = interpreted

    def test_kernels_are_right(
        self, family: str, norms: int, units: int, dtype: str, frozen: bool
    ) -> None:
        bound = 2e-6 if dtype == "float32" else 2e-2
        interpret(MODELS.format(
            family=family, dtype=dtype, bound=bound, frozen=frozen, norms=norms, units=units,
            modes=("layers",) if family == "gpt_oss" else ("layers", "selective"),
        ))  # fmt: skip


class TestInterpretedRuns:
    pytestmark = interpreted

    def test_narrow_norms_of_many_rows(self) -> None:
        interpret(MANY_ROWS)

    def test_runs_learn_the_same_and_repeat(self, tmp_path: Path) -> None:
        interpret(RUN.format(folder=str(tmp_path)))


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_every_norm_and_gated_unit_is_computed_on_a_gpu(family: str, dtype: str) -> None:
    import torch
    from test_kernels import wrapped

    from tunesmith.model.kernels import find_liger, use_kernels

    kernels = find_liger(insist=True)
    assert kernels is not None
    kind, device = getattr(torch, dtype), torch.device("cuda", 0)
    found = use_kernels(wrapped(family, kind).to(device).decoder, kernels, dtype=kind,
                        device=device)  # fmt: skip
    assert found.norms == found.norms_seen > 0
    assert found.units == found.units_seen == (0 if family == "gpt_oss" else 2)
