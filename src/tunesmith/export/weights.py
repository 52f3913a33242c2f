"""Trained weights as safetensors, under the tensor names and shards of the base model's files."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from tunesmith.model.adapters import AdapterState, save_adapter
from tunesmith.model.causal_lm import CausalLM

MAX_SHARD = "5GB"
"""Files above this size are split; readers on small machines map one at a time."""


def write_weights(model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> str:
    """Write all weights of a transformers model and return the name of their dtype.

    transformers keeps some families in another shape in memory (experts of a layer as one tensor)
    and turns them back when it saves; tied weights are written once. `dtype` rounds floating-point
    weights; None keeps what was computed with.
    """
    with _scratch(folder) as scratch, _quietly(model):
        model.save_pretrained(scratch, max_shard_size=MAX_SHARD, state_dict=_state(model, dtype))
        for path in sorted(scratch.glob("*.safetensors*")):
            path.rename(folder / path.name)
    return str(dtype or model.dtype).removeprefix("torch.")


def write_adapter(
    model: CausalLM, adapter: AdapterState, folder: Path, *, base: str, revision: str | None
) -> None:
    """Write the model's adapter and its configuration, which names `base`."""
    with _scratch(folder) as scratch:
        save_adapter(model, adapter, scratch)
        config = json.loads((scratch / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        config["revision"] = revision
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
        for path in sorted(scratch.glob("adapter_model*.safetensors")):
            path.rename(folder / path.name)


def _state(model: Any, dtype: torch.dtype | None) -> dict[str, torch.Tensor] | None:
    if dtype is None or dtype == model.dtype:
        return None
    cast: dict[tuple[int, torch.dtype], torch.Tensor] = {}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        # Tied weights must stay one tensor to be recognised as tied.
        key = (tensor.data_ptr(), tensor.dtype)
        if tensor.is_floating_point():
            tensor = cast.setdefault(key, tensor.to(dtype))
        state[name] = tensor
    return state


@contextlib.contextmanager
def _quietly(model: Any) -> Iterator[None]:
    """Save without progress bars, and without a look at the generation config.

    transformers refuses or comments on one that it finds odd; it would not be used anyway.
    """
    before = getattr(model, "generation_config", None)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    if before is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if before is not None:
            model.generation_config = before
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder on the same disk for files of which only some are wanted."""
    path = Path(tempfile.mkdtemp(dir=folder, prefix=".weights-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
