"""What llama.cpp computes from a written .gguf, against transformers on the model it was made of.

Skipped where llama-cpp-python can't be imported. It builds llama.cpp from source, with a C++
compiler and CMake: pip install llama-cpp-python
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import tiny_model, tiny_tokenizer
from tunesmith.cli.app import run

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

TEXTS = (
    "What is the capital of France? The capital of France is Paris.",
    "<|im_start|>user\nAdd 12 and 30<|im_end|>\n<|im_start|>assistant\n12 + 30 =",
    "  def add(a, b):\n\treturn a + b  # naïve, 1234567",
)
TOLERANCE = {"f16": 5e-3, "q8_0": 6e-2}
"""Of logits, relative and in the L2 norm: llama.cpp multiplies in F16 or Q8_0 with activations
rounded too."""
NEW = 24


def folder_of(path: Path, family: str) -> Path:
    """A tiny folder whose weights F16 holds exactly, so that rounding them is no difference."""
    scale = (
        {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
    )  # what llama.cpp takes it for
    model = tiny_model(family, **scale).half().float()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def check(folder: Path, out: Path, quantize: str) -> list[float]:
    """Ids, logits at each position, tokens of a greedy answer; how far logits were apart."""
    seen: list[float] = []
    words = ["export", str(folder), "--to", "gguf", "--quantize", quantize, "--out", str(out)]
    assert run(words) == 0
    reader = llama_cpp.Llama(
        str(next(out.glob("*.gguf"))), n_ctx=256, logits_all=True, verbose=False, n_threads=1
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert reader.tokenize(text.encode(), add_bos=False, special=True) == ids
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        reader.reset()
        reader.eval(ids)
        found = np.array(reader.scores[: len(ids)])
        apart = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        seen.append(float(apart))
        assert apart < TOLERANCE[quantize]
        if quantize == "f16":
            assert greedy(reader, ids, found) == list(answer(model, ids))
    return seen


def greedy(reader: Any, ids: list[int], scores: np.ndarray) -> list[int]:
    found: list[int] = []
    last = scores[-1]
    while len(found) < NEW:
        found.append(int(last.argmax()))
        reader.eval(found[-1:])
        last = np.array(reader.scores[len(ids) + len(found) - 1])
    return found


def answer(model: Any, ids: list[int]) -> list[int]:
    """Greedy ids by transformers, past any stop token."""
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
            eos_token_id=None, repetition_penalty=1.0,
        )  # fmt: skip
    return whole[0, len(ids) :].tolist()


@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_tiny_models(family: str, quantize: str, tmp_path: Path) -> None:
    check(folder_of(tmp_path / family, family), tmp_path / "out", quantize)


@pytest.mark.skipif(not os.environ.get("TUNESMITH_SMOLLM2"), reason="TUNESMITH_SMOLLM2 is not set")
@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
def test_smollm2(quantize: str, tmp_path: Path) -> None:
    check(Path(os.environ["TUNESMITH_SMOLLM2"]), tmp_path / "out", quantize)
