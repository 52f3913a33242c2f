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
from test_export_pieces import pieces_tokenizer
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
LIKELY = 10
"""Of so many of a position's likeliest tokens logits are compared with each other."""
CLEAR = {"f16": 0.9, "q8_0": 0.5}
"""Share of a greedy answer's tokens that must be beyond doubt, so that comparing them says much."""


def folder_of(path: Path, family: str) -> Path:
    """A tiny folder whose weights F16 holds exactly, so that rounding them is no difference."""
    options: dict[str, Any] = {}
    if family.startswith("gemma"):
        options["query_pre_attn_scalar"] = 16  # what llama.cpp takes it for
    if family == "gemma3_text":
        options["num_hidden_layers"] = 6  # the last of them sees everything, the others a window
    model = tiny_model(family, **options).half().float()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


class Readers:
    """One exported model as llama.cpp and as transformers compute it."""

    def __init__(self, folder: Path, out: Path, quantize: str) -> None:
        words = ["export", str(folder), "--to", "gguf", "--quantize", quantize, "--out", str(out)]
        assert run(words) == 0
        self.theirs = llama_cpp.Llama(
            str(next(out.glob("*.gguf"))), n_ctx=256, logits_all=True, verbose=False, n_threads=1
        )
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def found(self, ids: list[int]) -> np.ndarray:
        """llama.cpp's logits [n, V] of all ids at once."""
        self.theirs.reset()
        self.theirs.eval(ids)
        return np.array(self.theirs.scores[: len(ids)])

    def expected(self, ids: list[int]) -> np.ndarray:
        """transformers' logits [n, V]."""
        with torch.no_grad():
            return self.model(torch.tensor([ids])).logits[0].numpy()

    def answer(self, ids: list[int]) -> tuple[list[int], np.ndarray]:
        """llama.cpp's own greedy ids, one at a time and past any stop token, and the logits [NEW,
        V] that it chose them by.
        """
        rows = [self.found(ids)[-1]]
        chosen: list[int] = []
        while True:
            chosen.append(int(rows[-1].argmax()))
            if len(chosen) == NEW:
                return chosen, np.stack(rows)
            self.theirs.eval(chosen[-1:])
            rows.append(np.array(self.theirs.scores[len(ids) + len(chosen) - 1]))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def doubt(found: np.ndarray, expected: np.ndarray) -> float:
    """By how much the readers differ, at most, about how far two likely tokens are apart."""
    likely = np.argsort(expected, axis=1)[:, -LIKELY:]
    apart = np.take_along_axis(found - expected, likely, axis=1)
    return float((apart.max(axis=1) - apart.min(axis=1)).max())


def check(folder: Path, out: Path, quantize: str) -> dict[str, list[Any]]:
    """Ids, logits at each position, and a greedy answer, for each text; what was measured.

    Where two tokens are nearer to each other than the readers agree, either may come first. So the
    answer is llama.cpp's, and transformers judges each of its tokens in the same context: it may
    lie below the best one by no more than the readers differed on the text itself, and is the best
    one wherever the best one leads by more.
    """
    readers = Readers(folder, out, quantize)
    names = ("apart", "bound", "worst", "clear", "parted")
    seen: dict[str, list[Any]] = {name: [] for name in names}
    for text in TEXTS:
        ids = readers.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert readers.theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        found, expected = readers.found(ids), readers.expected(ids)
        bound = doubt(found, expected)
        chosen, theirs = readers.answer(ids)
        ours = readers.expected(ids + chosen)[len(ids) - 1 : -1]
        two = np.sort(ours, axis=1)[:, -2:]
        below = two[:, 1] - ours[np.arange(NEW), chosen]
        clear = two[:, 1] - two[:, 0] > bound
        seen["apart"] += [relative(found, expected), relative(theirs, ours)]
        seen["bound"].append(bound)
        seen["worst"].append(float(below.max()))
        seen["clear"].append(float(clear.mean()))
        seen["parted"] += [
            (int(at), float(below[at]), float(two[at, 1] - two[at, 0]))
            for at in np.flatnonzero(below > 0)
        ]
        assert max(seen["apart"][-2:]) < TOLERANCE[quantize]
        assert below.max() <= bound
        assert (below[clear] == 0).all()
    assert np.mean(seen["clear"]) >= CLEAR[quantize]
    return seen


@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"])
def test_tiny_models(family: str, quantize: str, tmp_path: Path, record_property: Any) -> None:
    seen = check(folder_of(tmp_path / family, family), tmp_path / "out", quantize)
    record_property("measured", seen)


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_are_read_alike(prefix: bool, tmp_path: Path) -> None:
    """A vocabulary of SentencePiece's kind, with and without a space put before the text."""
    tiny_model("mistral").half().float().save_pretrained(tmp_path / "m")
    pieces_tokenizer(prefix).save_pretrained(tmp_path / "m")
    readers = Readers(tmp_path / "m", tmp_path / "out", "f16")
    for text in ("The  answer is 42, 今日.", "<s>What is it?</s>", " naïve\tlines\n"):
        ids = readers.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert readers.theirs.tokenize(text.encode(), add_bos=False, special=True) == ids


@pytest.mark.skipif(not os.environ.get("TUNESMITH_SMOLLM2"), reason="TUNESMITH_SMOLLM2 is not set")
@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
def test_smollm2(quantize: str, tmp_path: Path, record_property: Any) -> None:
    seen = check(Path(os.environ["TUNESMITH_SMOLLM2"]), tmp_path / "out", quantize)
    record_property("measured", seen)
