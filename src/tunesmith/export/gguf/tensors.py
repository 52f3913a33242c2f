"""Tensor names and layouts of GGUF, from a transformers state dict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.export.gguf.header import Header

_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LLAMA = {"post_attention_layernorm": "ffn_norm"}
PARTS: dict[str, dict[str, str]] = {
    "llama": {**_ATTENTION, **_LLAMA},
    "qwen2": {**_ATTENTION, **_LLAMA},
    "qwen3": {**_ATTENTION, **_LLAMA, **_NORMS},
    "gemma2": {**_ATTENTION, **_GEMMA},
    "gemma3": {**_ATTENTION, **_GEMMA, **_NORMS},
}
_BIASES = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen2": ("q_proj", "k_proj", "v_proj"),
}
_NOT_TEXT = ("vision_tower", "multi_modal_projector")


def named_tensors(
    state: Mapping[str, Tensor], header: Header, *, tied: bool
) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 tensor, one after another; a tied head is left out.

    Raises:
        ModelError: a tensor without a place in the architecture.
    """
    for name, tensor in state.items():
        if any(part in name for part in _NOT_TEXT):
            continue
        plain = name.replace("model.language_model.", "model.")
        if plain == "lm_head.weight" and tied:
            continue
        yield gguf_name(plain, header.architecture), _laid_out(plain, tensor.float(), header)


def gguf_name(name: str, architecture: str) -> str:
    """What the tensor called `name` in transformers is called in the file.

    Raises:
        ModelError: the architecture has no such tensor.
    """
    if name in _OUTER and not (name == "lm_head.weight" and architecture == "gemma2"):
        return _OUTER[name]
    if name.startswith("model.layers."):
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        part, _, kind = rest.rpartition(".")
        short = part.rpartition(".")[2]
        found = PARTS[architecture].get(part)
        if found and (kind == "weight" or short in _BIASES.get(architecture, ())):
            return f"blk.{layer}.{found}.{kind}"
    raise ModelError(f"a .gguf file of {architecture} has no place for the tensor {name}")


def _laid_out(name: str, tensor: Tensor, header: Header) -> Tensor:
    if header.architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
        return permute(tensor, header.heads[".k_proj." in name])
    if header.architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def permute(tensor: Tensor, heads: int) -> Tensor:
    """Rotary rows of each head from halves (i, i + d/2) to pairs (2i, 2i + 1)."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


def unpermute(tensor: Tensor, heads: int) -> Tensor:
    """The inverse of `permute`."""
    pairs = tensor.reshape(heads, tensor.shape[0] // heads // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def hub_state(tensors: Mapping[str, Tensor], header: Header) -> dict[str, Tensor]:
    """The tensors of a file under transformers' names again."""
    outer = {short: name for name, short in _OUTER.items()}
    parts = {short: name for name, short in PARTS[header.architecture].items()}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in outer:
            found = outer[name]
        else:
            _, layer, part, kind = name.split(".")
            found = f"model.layers.{layer}.{parts[part]}.{kind}"
            if header.architecture == "llama" and part in ("attn_q", "attn_k"):
                tensor = unpermute(tensor, header.heads[part == "attn_k"])
        if header.architecture.startswith("gemma") and "norm" in name:
            tensor = tensor - torch.ones_like(tensor)
        state[found] = tensor
    return state
