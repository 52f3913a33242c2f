"""Initialisation of PiSSA (arXiv 2404.02948), OLoRA (arXiv 2406.01775) and LoftQ (arXiv
2310.08659), and their export as plain LoRA of the original base.

With W the base weight, A0 and B0 the beginning, such a model trains W - s B0 A0 + s B A. On the
original W the same is the LoRA of twice the rank s [B, -B0] [A; A0], which is what peft makes of it
and what is exported: it loads without a changed base.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.adapters.kinds import CHANGE_BASE
from tunesmith.model.adapters.state import AdapterState
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.packed_weight import is_quantized
from tunesmith.model.source import CHOICE_FILE, read_json
from tunesmith.model.weight_files import WeightFiles

OF_QUANTIZED = "of_quantized_base"
"""Entry beside an adapter that began with what quantising took from its base: on the plain base it
adds that once too often, and peft's own configuration has no place to say so.
"""


def taken_from_base(causal_lm: CausalLM, kind: str) -> dict[str, Tensor] | None:
    """A copy of the adapter as it begins, if that was taken out of the base; None otherwise."""
    if kind not in CHANGE_BASE:
        return None
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(causal_lm.model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}


@torch.no_grad()
def begin_with_loftq(causal_lm: CausalLM) -> None:
    """Let the product of A and B begin as the best of its rank for what quantising took from the
    base's weights: the first step of LoftQ (2310.08659), which leaves the quantised base as it is.

    Raises:
        ModelError: the base's weights are not found in safetensors files.
    """
    folder = Path(str(causal_lm.config._name_or_path))
    files = WeightFiles(folder)
    prefix = f"{causal_lm.base.base_model_prefix}."
    for name, module in causal_lm.base.named_modules():
        if not hasattr(module, "lora_A") or not is_quantized(module.base_layer):
            continue
        plain = _read_weight(files, name, prefix)
        kept = module.base_layer.plain_weight(torch.float32)
        if plain is None or plain.numel() != kept.numel():
            raise ModelError(
                f"loftq can't begin here: the files hold no {name}.weight",
                where=str(folder),
                hint="adapter.kind=lora",
            )
        plain = plain.float().to(kept.device)
        source = getattr(module.base_layer, "source_cls", None)
        if source is not None and source.__name__ == "Conv1D":
            plain = plain.T
        _begin_as(module, plain - kept)


def began_quantized(folder: Path) -> bool:
    """Whether the adapter in the folder began with what quantising took from its base."""
    path = folder / CHOICE_FILE
    return path.is_file() and bool(read_json(path).get(OF_QUANTIZED, False))


def _begin_as(module: Any, difference: Tensor) -> None:
    """A and B with B A times the scale the nearest to `difference` of their rank."""
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    for name, down in module.lora_A.items():
        up, rank = module.lora_B[name], down.weight.shape[0]
        root = values[:rank].sqrt()
        down.weight.copy_(root[:, None] * right[:rank])
        up.weight.copy_(left[:, :rank] * root / module.scaling[name])


def _read_weight(files: WeightFiles, name: str, prefix: str) -> Tensor | None:
    """Files of some families leave the prefix of the decoder out."""
    keys = (f"{name}.weight", f"{name}.weight".removeprefix(prefix))
    found = next((key for key in keys if key in files.names), None)
    return None if found is None else files.tensor(found)


def save_adapter(causal_lm: CausalLM, adapter: AdapterState, folder: Path) -> None:
    """peft's files of the adapter in `folder`, fit for the original base."""
    model, start = causal_lm.model, adapter.start
    if start is None:
        # peft would look for the base model's vocabulary to decide about embeddings; what is on
        # them is saved like all else
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    training = model.training
    with (
        TemporaryDirectory() as scratch,
        torch.random.fork_rng(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # about kinds of conversion that this is not
        beginning = Path(scratch) / "beginning"
        beginning.mkdir()
        save_file(dict(start), beginning / "adapter_model.safetensors", metadata={"format": "pt"})
        model.save_pretrained(
            folder,
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(beginning),
        )
    model.train(training)
