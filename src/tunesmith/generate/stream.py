"""Streaming generation of one answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from tunesmith.data.templates.template import Template
from tunesmith.generate.batched import (
    Generation,
    Options,
    RowSampler,
    finish,
    new_tokens,
    plain_generation,
    visible_text,
)
from tunesmith.model.causal_lm import CausalLM


class _Pieces(BaseStreamer):
    """Hands on the text that later tokens can't change any more.

    All ids are decoded together each time: decoders that treat the first token of a text apart
    would otherwise lose the space before every piece.
    """

    def __init__(self, template: Template, on_text: Callable[[str], None]) -> None:
        self.template = template
        self.on_text = on_text
        self.ids: list[int] | None = None
        self.shown = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt at the first call, then one token a call."""
        if self.ids is None:
            self.ids = []
            return
        new = [int(i) for i in value.reshape(-1)]
        self.ids += [i for i in new if i not in self.template.stop_ids]
        text = visible_text(self.ids, self.template)
        # A character may take several tokens; until the last one it reads as U+FFFD.
        self._show(text.rstrip("\ufffd"))

    def end(self) -> None:
        """Show what was held back."""
        self._show(visible_text(self.ids or [], self.template))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            self.on_text(text[len(self.shown) :])
            self.shown = text


def stream(
    model: CausalLM,
    template: Template,
    prompt: Sequence[int],
    on_text: Callable[[str], None],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generation:
    """Answer one prompt, calling `on_text` with each piece of the answer as soon as it is certain.

    Raises:
        DataError: as `generate`.
    """
    options = Options(max_new_tokens, temperature, top_p, seed)
    limit = new_tokens(prompt, template, options)
    processors = LogitsProcessorList()
    if temperature > 0:
        processors.append(RowSampler([0], temperature=temperature, top_p=top_p, seed=seed))
    with plain_generation(model, template, limit) as (hf_model, config):
        device = next(hf_model.parameters()).device
        ids = torch.tensor([[int(i) for i in prompt]], device=device)
        output = hf_model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=processors,
            streamer=_Pieces(template, on_text),
        )
    return finish(output[0, len(prompt) :].tolist(), template)
