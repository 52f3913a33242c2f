"""Deferred loading on the meta device: weights stay in their safetensors files until each rank
reads its shards.

It is built without memory for its weights. Whether they can be read as they lie in the files is
found out, not assumed: a trial model of the same config with few layers is loaded as always, and
every weight and buffer of it must be, to the bit, what would be read here. So a family whose
weights are renamed, fused or turned on the way in is loaded whole instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.architecture import find_architecture
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM, find_decoder
from tunesmith.model.layers import per_layer
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.load import (
    LoadedModel,
    checked_config,
    finish,
    load_causal_lm,
    published_as,
    read_generation_config,
    silence,
)
from tunesmith.model.quiet import quiet
from tunesmith.model.source import ModelSource
from tunesmith.model.weight_files import WeightFiles


@dataclass(frozen=True, slots=True)
class Traits:
    """What the trial found of the model that is built without weights."""

    native_attention: str
    unpacked: bool


def trial_model(
    source: ModelSource, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> CausalLM | None:
    """The model with its first layers only, one of each kind at least; None if that takes them all.

    Raises:
        ModelError: as loading the whole does.
    """
    config = checked_config(source, trust_remote_code)
    whole = _without_weights(
        checked_config(source, trust_remote_code), source.name, dtype, trust_remote_code
    )
    text = config.get_text_config()
    count = _layers_of_each_kind(whole, text)
    if count >= text.num_hidden_layers:
        return None
    with quiet(reports=False):
        return load_causal_lm(
            source, dtype=dtype, trust_remote_code=trust_remote_code, layers=count
        ).model


def deferred_model(
    source: ModelSource, traits: Traits, *, dtype: torch.dtype, trust_remote_code: bool = False
) -> LoadedModel:
    """The whole model, its weights placeholders on the CPU that take no memory, and the files that
    they are still to be read from.
    """
    config = checked_config(source, trust_remote_code)
    notes = [*published_as(source), *silence(config)]
    model = _without_weights(config, source.name, dtype, trust_remote_code)
    read_generation_config(model, source)
    _replace_parameters(model, _placeholder, of=model.parameters())
    causal_lm = CausalLM(
        model.eval(),
        logits=read_logit_transform(config.get_text_config()),
        native_attention=traits.native_attention,
        unpacked=traits.unpacked,
    )
    if not traits.unpacked:
        attention.register()
        causal_lm.set_attention(attention.NAME)
    files = WeightFiles(source.folder, list(model.parameters()))
    return LoadedModel(causal_lm, [*notes, *finish(causal_lm)], unread=files)


def mismatch(deferred: LoadedModel, trial: CausalLM) -> str | None:
    """Why the weights can't be read as they lie in the files, by what the trial model holds; None
    if they can.
    """
    files, base = deferred.unread, deferred.model.base
    assert files is not None
    mine, whole = dict(base.named_parameters()), dict(trial.base.named_parameters())
    for name, parameter in mine.items():
        if files.shape(name) != tuple(parameter.shape):
            return f"{name} is not in its files as the model holds it"
    for name, tensor in whole.items():
        if name not in mine or mine[name].dtype != tensor.dtype:
            return f"{name} is kept in another way"
        read = files.read(name, [0] * tensor.ndim, tensor.shape).to(tensor.dtype)
        if not _same(read, tensor):
            return f"{name} is changed while it is loaded"
    buffers = dict(base.named_buffers())
    for name, tensor in trial.base.named_buffers():
        if name not in buffers or not _same(buffers[name], tensor):
            return f"{name} is not made by the model itself"
    return None


def _same(one: Tensor, two: Tensor) -> bool:
    """To the bit, so that what is not a number is the same too."""
    if one.device != two.device or one.dtype != two.dtype or one.shape != two.shape:
        return False
    bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, two) if t.numel()]
    return not bits or torch.equal(*bits)


def release(causal_lm: CausalLM, unread: WeightFiles) -> None:
    """Make the placeholders tensors without any memory, which can be spread; they stay tied and
    trainable as they are.
    """
    _replace_parameters(
        causal_lm, lambda p: torch.empty_like(p, device="meta").contiguous(), of=unread.placeholders
    )


@torch.no_grad()
def _replace_parameters(
    root: nn.Module, make: Callable[[nn.Parameter], Tensor], *, of: Iterable[nn.Parameter]
) -> None:
    """Put what `make` gives in place of these parameters."""
    old = list(of)  # kept, so that no new one gets the id of an old one
    made = {id(p): nn.Parameter(make(p), p.requires_grad) for p in old}
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in made:
                module._parameters[name] = made[id(parameter)]


def _placeholder(parameter: nn.Parameter) -> Tensor:
    """As large as the parameter to look at, one element in memory."""
    return torch.zeros(1, dtype=parameter.dtype).expand(parameter.shape)


def _without_weights(config: Any, where: str, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    architecture = find_architecture(config, where, trust_remote_code=trust_remote_code)
    with _weights_on_meta(), quiet(reports=False):
        model: Any = architecture.from_config(config, dtype=dtype)
    model.tie_weights()
    model._weight_conversions = []  # it is only used where files hold the names of the modules
    return model


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """Inside, parameters of new modules have no memory; buffers are made as always."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def _layers_of_each_kind(model: Any, config: Any) -> int:
    """How many of the first layers have one of each kind, by their weights and what the config says
    of each.
    """
    total = config.num_hidden_layers
    lists = [value for value in vars(config).values() if per_layer(value, total)]
    decoder = find_decoder(model)
    layers = next(
        m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == total
    )  # fmt: skip
    seen: set[str] = set()
    count = 1
    for number, layer in enumerate(layers):
        shapes = [(name, tuple(p.shape)) for name, p in layer.named_parameters()]
        kind = repr((shapes, [value[number] for value in lists]))
        if kind not in seen:
            seen.add(kind)
            count = number + 1
    return count
