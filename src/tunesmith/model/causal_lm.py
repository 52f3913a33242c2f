"""The root module: a transformers decoder and our loss head in one forward."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.attention.dispatch import NAME
from tunesmith.model.lm_head import LogitTransform, head_inputs
from tunesmith.model.ops.activation_offload import offloaded
from tunesmith.model.ops.bf16_upcast import needs_upcast, upcast
from tunesmith.model.quiet import quiet
from tunesmith.model.recurrent import replace as recurrent
from tunesmith.model.recurrent.active_layout import use_layout
from tunesmith.types import Batch, HeadLoss, LossOutput


class CausalLM(nn.Module):
    """A causal language model that takes a `Batch` and returns sums of losses.

    `model` is a transformers model or one wrapped by peft, and may hold more than a language model:
    a vision tower, say. Only the decoder and the head inside it see text. The decoder's attention
    is exchanged by name (`set_attn_implementation`). Single modules of it may compute by another
    forward or class: recurrent layers, fused kernels, torch.compile, float8, upcast bfloat16, fused
    LoRA, dequantised weights and tensor parallelism set these with `tunesmith.module_swap`, which
    puts back what was there.

    `native_attention` is the implementation it uses outside of packed batches: for generation, and
    for batches without a layout. An `unpacked` model takes no other attention than its own.
    """

    def __init__(
        self,
        model: Any,
        *,
        logits: LogitTransform,
        native_attention: str = "sdpa",
        unpacked: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        # Tensor parallelism swaps its forward for a collective.
        self.before_head = nn.Identity()
        self.logits = logits
        self.native_attention = native_attention
        self.unpacked = unpacked

    @property
    def base(self) -> Any:
        """The transformers model, inside peft's wrapper or not."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def decoder(self) -> nn.Module:
        """What turns ids into hidden states, final norm included."""
        return find_decoder(self.base)

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def head(self) -> nn.Linear:
        """The output embedding."""
        return self.base.get_output_embeddings()

    def replace_model(self, model: Any) -> None:
        """Take `model` instead: the same with peft's wrapper around it, or without."""
        self.model = model

    def run_unpacked(self) -> None:
        """From now on batches carry no layout: one path at a time through the model's own
        attention.
        """
        self.unpacked = True
        recurrent.restore(self.model)
        self.set_attention(self.native_attention)

    def set_attention(self, name: str) -> bool:
        """Exchange the decoder's attention, that of no other part; whether it took it."""
        decoder: Any = self.decoder
        if not hasattr(decoder, "set_attn_implementation"):
            return False
        with quiet(reports=False):
            decoder.set_attn_implementation(name)
        return decoder.config._attn_implementation == name

    def hidden(self, batch: Batch, *, offload: bool = False) -> Tensor:
        """Hidden states after the final norm, [T, D]; with `offload` the decoder's activations wait
        for the backward pass in the host's memory.
        """
        decoder = self.decoder
        keywords: dict[str, Any] = {}
        if _takes_positions(type(decoder)):
            keywords = {"position_ids": batch.position_ids[None]}
        if batch.layout is not None:
            # Without a mask transformers would look for packed rows in the positions, for which a
            # GPU has to be waited for.
            seen = torch.ones_like(batch.input_ids[None], dtype=torch.bool)
            keywords |= {"layout": batch.layout, "attention_mask": seen}
        with use_layout(batch.layout), offloaded(self) if offload else nullcontext():
            output = decoder(input_ids=batch.input_ids[None], use_cache=False, **keywords)
        return self.before_head(output.last_hidden_state)[0]

    def forward(self, batch: Batch, head_loss: HeadLoss, *, offload: bool = False) -> LossOutput:
        """The loss of the batch's targets; `head_loss` is the head with its objective chosen."""
        hidden, weight, bias = head_inputs(self.head, self.hidden(batch, offload=offload))
        if needs_upcast(weight):
            hidden, weight = upcast(hidden), upcast(weight)
        return head_loss(
            hidden,
            weight,
            bias,
            source=batch.source,
            target=batch.target,
            target_weight=batch.weight,
            transform=None if self.logits.identity else self.logits.apply,
        )

    @contextmanager
    def generation(self) -> Iterator[Any]:
        """The transformers (or peft) model, in eval mode with its own attention and cache; restored
        on leaving.
        """
        training, base = self.training, self.base
        self.eval()
        self.set_attention(self.native_attention)
        base.config.use_cache = True
        try:
            yield self.model
        finally:
            base.config.use_cache = False
            self.set_attention(self.native_attention if self.unpacked else NAME)
            self.train(training)


def find_decoder(base: Any) -> Any:
    """The module of a transformers model that turns ids into hidden states.

    A wrapper's `get_decoder` may return a whole causal language model (llama4's does), whose output
    is logits; some models return themselves, and some have a head that is called `decoder`.
    """
    found = base
    while _has_head(found):
        inner = found.get_decoder()
        if inner is found or not _has_embedding(inner):
            inner = found.base_model
        found = found.model if inner is found else inner
    return found


def outside_decoder(causal_lm: CausalLM) -> frozenset[str]:
    """Names of the base's parameters that are in neither its decoder nor its head."""
    base = causal_lm.base
    inside = {id(p) for part in (causal_lm.decoder, causal_lm.head) for p in part.parameters()}
    return frozenset(name for name, p in base.named_parameters() if id(p) not in inside)


def _has_head(module: Any) -> bool:
    ask = getattr(module, "get_output_embeddings", None)
    return ask is not None and ask() is not None


def _has_embedding(module: nn.Module) -> bool:
    return any(isinstance(one, nn.Embedding) for one in module.modules())


@functools.cache
def _takes_positions(kind: type[nn.Module]) -> bool:
    """Whether a decoder of this class can be told the positions; others count from 0 themselves."""
    return "position_ids" in inspect.signature(kind.forward).parameters
