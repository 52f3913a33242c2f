"""Trained weights as safetensors: every tensor of the base model's files, under its name there, in
the shard it is in.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import logging

from tunesmith.model.adapters import AdapterState, save_adapter
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.source import read_json
from tunesmith.model.weight_files import (
    INDEX,
    SINGLE,
    FileTensors,
    WeightFiles,
    tensors_by_file_name,
)

MAX_SHARD = "5GB"
"""Files above this size are split; readers on small machines map one at a time."""


def write_weights(
    model: Any, folder: Path, *, base: Path | None = None, dtype: torch.dtype | None = None
) -> str:
    """Write all weights of a transformers model and return the name of their dtype.

    With `base`, the folder it was read from, the files hold every tensor of the base's files under
    the same names, in the same shards: what is unchanged byte for byte, and so what no module of
    the model holds. `dtype` rounds changed floating-point weights; None keeps what was computed
    with.
    """
    files = None if base is None else WeightFiles(base)
    if base is None or files is None or not files.paths:
        _save(model, folder, dtype)
    else:
        found = tensors_by_file_name(model, model.state_dict(), files.names)
        for path in files.paths:
            _write_shard(files, path, folder / path.name, found, dtype)
        if files.paths[0].name != SINGLE:
            _write_index(base, folder, [path.name for path in files.paths])
    return str(dtype or model.dtype).removeprefix("torch.")


def _save(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    """As transformers writes a model that was not read from files; tied weights once."""
    with _scratch(folder) as scratch, _quietly(model):
        model.save_pretrained(scratch, max_shard_size=MAX_SHARD, state_dict=_state(model, dtype))
        for path in sorted(scratch.glob("*.safetensors*")):
            path.rename(folder / path.name)


def _write_shard(
    files: WeightFiles, source: Path, target: Path, found: FileTensors, dtype: torch.dtype | None
) -> None:
    """One file: the base's tensors with what changed of them put in, and in the last file the new
    ones after them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name in files.names_in(source):
        trained = found.known.get(name)
        if trained is not None:
            original = files.tensor(name)
            same = _unchanged(original, trained)
            tensors[name] = original if same else _plain(trained, dtype)
        elif name in found.unread:
            tensors[name] = files.tensor(name)
    if source == files.paths[-1]:
        tensors |= {name: _plain(tensor, dtype) for name, tensor in found.new.items()}
    save_file(tensors, target, metadata=files.metadata(source))


def _unchanged(original: torch.Tensor, trained: torch.Tensor) -> bool:
    """Whether the model holds what the base's file holds, to the bit or rounded to its dtype."""
    if original.shape != trained.shape:
        return False
    return torch.equal(original.to(trained.dtype), trained.detach().cpu())


def _plain(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Rounded, on the CPU, in memory of its own: files don't hold shared memory."""
    wanted = dtype if tensor.is_floating_point() else None
    return tensor.detach().to("cpu", wanted, copy=True).contiguous()


def _write_index(base: Path, folder: Path, names: Sequence[str]) -> None:
    """The base's index with the tensors and the size that the files have now."""
    index = read_json(base / INDEX)
    places: dict[str, str] = {}
    size = 0
    for shard in names:
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                tensor = file.get_tensor(name)
                places[name] = shard
                size += tensor.numel() * tensor.element_size()
    metadata = {**(index.get("metadata") or {}), "total_size": size}
    text = json.dumps({"metadata": metadata, "weight_map": places}, indent=2) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


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
