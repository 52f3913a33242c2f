"""Readers on transformers 4 compute with an exported folder what was trained."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny import FAMILIES, tiny_folder
from tunesmith.data.templates.load import load_template
from tunesmith.export import ModelCard, write_model
from tunesmith.generate import generate
from tunesmith.model.adapters import NO_ADAPTER
from tunesmith.model.load import load_causal_lm, resolve_model

pytestmark = pytest.mark.slow

PACKAGE = "transformers==4.57.6"
CHAT = [{"role": "user", "content": "What is 12 plus 30?"}]
READER = """
import json, sys
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
folder, out, chat = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
with torch.no_grad():
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    answer = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids):]
eos = model.generation_config.eos_token_id
np.save(out + ".npy", logits.float().numpy())
json.dump({"ids": ids, "answer": answer.tolist(), "eos": eos if isinstance(eos, list) else [eos],
           "dtype": str(model.dtype), "text": tokenizer.decode(ids)}, open(out + ".json", "w"))
"""


@pytest.fixture(scope="session")
def transformers4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers 4 and what it needs; torch comes from the running environment."""
    given = os.environ.get("TUNESMITH_TRANSFORMERS4")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder), PACKAGE]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder


def read_with(transformers4: Path, folder: Path, out: Path) -> tuple[np.ndarray, dict]:
    environment = {**os.environ, "PYTHONPATH": str(transformers4), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READER, str(folder), str(out), json.dumps(CHAT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(f"{out}.npy"), json.loads(Path(f"{out}.json").read_text())


def exported(base: Path, out: Path, dtype: str):
    """The folder of a model whose weights have been moved, with the model and its template."""
    source = resolve_model(str(base))
    model, template = load_causal_lm(source, dtype=dtype).model, load_template(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn_like(parameter))
    write_model(model, template, source, out, card=ModelCard("base"), adapter=NO_ADAPTER)
    return model, template


def check(transformers4: Path, base: Path, folder: Path, *, dtype: str, tolerance: float) -> dict:
    model, template = exported(base, folder / "out", dtype)
    logits, seen = read_with(transformers4, folder / "out", folder / "seen")
    ids = list(template.encode([template.render(CHAT, add_generation_prompt=True)])[0])
    assert seen["ids"] == [int(i) for i in ids]
    assert seen["dtype"] == f"torch.{dtype}"
    assert set(seen["eos"]) == set(template.stop_ids)
    with model.generation() as plain, torch.no_grad():
        plain.set_attn_implementation("eager")
        expected = plain(input_ids=torch.tensor([seen["ids"]])).logits[0].float().numpy()
    difference = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert difference <= tolerance
    answer = generate(model, template, [ids], max_new_tokens=16)[0]
    seen["same_answer"] = list(answer.ids) == seen["answer"]
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_models(family: str, transformers4: Path, tmp_path: Path):
    # A base far from every default: a key that is not found shows in the logits.
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 75.0}}
    base = tiny_folder(tmp_path / "base", family, **rope)
    seen = check(transformers4, base, tmp_path, dtype="float32", tolerance=1e-5)
    assert seen["same_answer"]


def test_the_check_can_fail(transformers4: Path, tmp_path: Path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 75.0}}
    base = tiny_folder(tmp_path / "base", **rope)
    exported(base, tmp_path / "out", "float32")
    right, _ = read_with(transformers4, tmp_path / "out", tmp_path / "right")
    shutil.copyfile(base / "config.json", tmp_path / "out" / "config.json")
    wrong, _ = read_with(transformers4, tmp_path / "out", tmp_path / "wrong")
    assert np.abs(right - wrong).max() > 1e-2


def test_scaled_rope(transformers4: Path, tmp_path: Path):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }
    base = tiny_folder(tmp_path / "base", rope_parameters=scaled)
    assert check(transformers4, base, tmp_path, dtype="float32", tolerance=1e-5)["same_answer"]


def test_smollm2(transformers4: Path, smollm2: Path, tmp_path: Path):
    seen = check(transformers4, smollm2, tmp_path, dtype="bfloat16", tolerance=2e-2)
    assert seen["text"].startswith("<|im_start|>")
