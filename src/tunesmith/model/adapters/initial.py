"""Adapters that begin with a part of the weights they go on, given out as plain LoRA.

With W the base weight, A0 and B0 the beginning, such a model trains W - s B0 A0 + s B A. On the
original W the same is the LoRA of twice the rank s [B, -B0] [A; A0], which is what peft makes of it
and what is exported: it loads without a changed base.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from tunesmith.errors import ModelError
from tunesmith.model.adapters.kinds import CHANGE_BASE
from tunesmith.model.causal_lm import CausalLM


def remember_start(causal_lm: CausalLM, kind: str) -> None:
    """Keep the beginning of an adapter that took it out of the base."""
    if kind in CHANGE_BASE:
        from peft import get_peft_model_state_dict

        state = get_peft_model_state_dict(causal_lm.model, save_embedding_layers=False)
        causal_lm.adapter_start = {
            name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()
        }


@torch.no_grad()
def begin_with_loftq(causal_lm: CausalLM) -> None:
    """Let A and B begin as the best low-rank form of what 4-bit quantising took from the base's
    files; B over the adapter's scale, which the product is multiplied by.

    Raises:
        ModelError: the base's layers are not 4-bit ones of bitsandbytes, or its files aren't there.
    """
    import peft

    model, folder = causal_lm.model, str(causal_lm.config._name_or_path)
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    try:
        peft.replace_lora_weights_loftq(model, model_path=folder)
    except (ValueError, OSError, TypeError) as error:
        raise ModelError(
            f"loftq can't begin here: {str(error).splitlines()[0]}", where="adapter.kind"
        ) from error
    for module in model.modules():
        for name, up in getattr(module, "lora_B", {}).items():
            up.weight.div_(module.scaling[name])
    for name, parameter in model.named_parameters():
        if name in dtypes and parameter.dtype != dtypes[name]:
            parameter.data = parameter.data.to(dtypes[name])


def save_adapter(causal_lm: CausalLM, folder: Path) -> None:
    """peft's files of the adapter in `folder`, fit for the original base."""
    model, start = causal_lm.model, causal_lm.adapter_start
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
        save_file(start, beginning / "adapter_model.safetensors", metadata={"format": "pt"})
        model.save_pretrained(
            folder,
            save_embedding_layers=False,
            path_initial_model_for_weight_conversion=str(beginning),
        )
    model.train(training)
