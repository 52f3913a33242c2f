"""The root module: a transformers decoder and our loss head in one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.attention.dispatch import NAME
from tunesmith.model.lm_head import LogitTransform, head_inputs
from tunesmith.model.ops.activation_offload import offloaded
from tunesmith.model.ops.bf16_upcast import needs_upcast, upcast
from tunesmith.types import Batch, HeadLoss, LossOutput


class CausalLM(nn.Module):
    """A causal language model that takes a `Batch` and returns sums of losses.

    `model` is a transformers model or one wrapped by peft. Its attention is exchanged by name
    (`set_attn_implementation`). Single modules of it may compute by another forward or class: fused
    kernels, torch.compile, float8, upcast bfloat16, fused LoRA, dequantised weights and tensor
    parallelism set these with `tunesmith.module_swap`, which puts back what was there.

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
        base = self.base
        decoder = base.get_decoder()
        return base.model if decoder is base else decoder

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
        self.base.set_attn_implementation(self.native_attention)

    def hidden(self, batch: Batch, *, offload: bool = False) -> Tensor:
        """Hidden states after the final norm, [T, D]; with `offload` the decoder's activations wait
        for the backward pass in the host's memory.
        """
        keywords: dict[str, Any] = {}
        if batch.layout is not None:
            # Without a mask transformers would look for packed rows in the positions, for which a
            # GPU has to be waited for.
            seen = torch.ones_like(batch.input_ids[None], dtype=torch.bool)
            keywords = {"layout": batch.layout, "attention_mask": seen}
        with offloaded(self) if offload else nullcontext():
            output = self.decoder(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                **keywords,
            )
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
        base.set_attn_implementation(self.native_attention)
        base.config.use_cache = True
        try:
            yield self.model
        finally:
            base.config.use_cache = False
            base.set_attn_implementation(self.native_attention if self.unpacked else NAME)
            self.train(training)
