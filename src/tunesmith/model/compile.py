"""Regional torch.compile: decoder layers of a class share one compiled code with dynamic shapes.

Attention and recurrent mixers stay out of the graphs: they look at layouts, which are Python
objects and change with each micro-batch. Attention brings a compiled kernel of its own. What
recomputes activations stays outside too, around the compiled layer. Only `forward` of each layer
and mixer is replaced; class, weights and names stay.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.numerics import ONE_OPERATION, Comparison, equivalence_trial
from tunesmith.model.recurrent import replace as recurrent
from tunesmith.model.recurrent.active_layout import use_layout
from tunesmith.module_swap import ModuleSwap, without_forwards
from tunesmith.types import Batch

SWAP = ModuleSwap("torch.compile")
WRAPPER = "forward_with_checkpointing"
"""The function that transformers puts around a layer's own forward."""
OPTIONS = {"fallback_random": True}
"""Noise is drawn as without compiling."""


def compile_layers(
    layers: Sequence[nn.Module], *, backend: str = "inductor", deterministic: bool = True
) -> None:
    """Compile each layer when it is first called; `deterministic`: no choice of code by timing."""
    attention.register(apart=True)
    options: Any = {**OPTIONS, "deterministic": deterministic} if backend == "inductor" else None
    made: dict[Callable[..., Any], Callable[..., Any]] = {}
    for layer in layers:
        plain, wrapped = _plain_forward(type(layer))
        if plain not in made:
            made[plain] = torch.compile(plain, dynamic=True, backend=backend, options=options)
        SWAP.set_forward(layer, _forward(made[plain], plain, wrapped))
        for mixer in recurrent.SWAP.swapped(layer):
            swapped = mixer.__dict__.get("forward")
            plain = type(mixer).forward if swapped is None else swapped.__func__
            SWAP.set_forward(mixer, torch.compiler.disable(plain))


def restore_layers(model: nn.Module) -> None:
    """Undo `compile_layers`."""
    SWAP.restore(model)


def difference(model: CausalLM, layers: Sequence[nn.Module], batch: Batch) -> float:
    """How far compiled layers are from the same layers as they are, each on the hidden states of
    `batch` that reach it, in multiples of what rounding explains: output, gradients of its input
    and of what is trained in it. Infinite where it is not a number.

    What is compiled for training and for evaluation is made here, and so does not depend on what
    sizes come first in a run. Weights and gradients are left as they were.
    """
    training = model.training
    bound = ONE_OPERATION.get(model.head.weight.dtype)
    if bound is None:
        return math.inf

    def compare() -> Iterator[Comparison]:
        for layer, inputs, named in _inputs(model, layers, batch):
            plain, _ = _plain_forward(type(layer))
            with use_layout(batch.layout):
                expected = _learned(functools.partial(plain, layer), layer, inputs, named)
                found = _learned(layer, layer, inputs, named)
            yield from _comparisons(found, expected, bound)

    try:
        model.train()
        excess = equivalence_trial(compare, catch=()).excess  # what it raises is told by the caller
        model.eval()
        with torch.no_grad():
            model.hidden(batch)
    finally:
        model.train(training)
    return excess


def _plain_forward(layer: type[nn.Module]) -> tuple[Callable[..., Any], bool]:
    """A class's forward, and whether what recomputes it was around it."""
    forward: Any = layer.forward
    wrapped = False
    while getattr(getattr(forward, "__code__", None), "co_name", None) == WRAPPER:
        forward, wrapped = forward.__wrapped__, True
    return forward, wrapped


def _forward(
    compiled: Callable[..., Any], plain: Callable[..., Any], wrapped: bool
) -> Callable[..., Any]:
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        # answers are generated a token at a time with a cache that grows: not worth a compilation
        cached = named.get("past_key_values") is not None
        compute = functools.partial(plain if cached else compiled, self, **named)
        if wrapped and self.gradient_checkpointing and self.training and not cached:
            return self._gradient_checkpointing_func(compute, *inputs)
        return compute(*inputs)

    return forward


def _inputs(
    model: CausalLM, layers: Sequence[nn.Module], batch: Batch
) -> Iterator[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """Each layer with what the decoder calls it with."""
    seen: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen[layer] = inputs, named

    with torch.no_grad(), without_forwards(layers):
        handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in layers]
        try:
            model.hidden(batch)
        finally:
            for handle in handles:
                handle.remove()
    yield from ((layer, *called) for layer, called in seen.items())


def _learned(
    compute: Callable[..., Any], layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> list[Tensor]:
    """Output, gradients of the input and of what is trained, with the same noise each time."""
    hidden = inputs[0].detach().clone().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    devices = [hidden.device] if hidden.is_cuda else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(0)
        output = compute(hidden, *inputs[1:], **named)
        output = output[0] if isinstance(output, tuple) else output
        ramp = torch.arange(output.numel(), device=output.device).view_as(output)
        toward = ramp.float().cos().to(output.dtype)
        gradients = torch.autograd.grad(output, [hidden, *trained], toward, allow_unused=True)
    return [output.detach(), *(g for g in gradients if g is not None)]


def _comparisons(
    found: Sequence[Tensor], expected: Sequence[Tensor], bound: float
) -> Iterator[Comparison]:
    """Output, gradient of the input, gradients of what is trained. Of tokens in 16 bits the median
    difference counts, since rounding can send a token to another expert.
    """
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        tokens = number < 2 and other.dtype != torch.float32
        yield Comparison(one, other, bound, robust=tokens)
