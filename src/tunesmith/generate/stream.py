"""One answer, handed on as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList, TextStreamer

from tunesmith.generate.batched import (
    Generation,
    Options,
    finish,
    new_tokens,
    plain_generation,
)
from tunesmith.generate.sampling import RowSampler
from tunesmith.model.causal_lm import CausalLM


class _Pieces(TextStreamer):
    """Gives finished pieces of text to a function."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.on_text(text)


def stream(
    model: CausalLM,
    template: Any,
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
            streamer=_Pieces(template.tokenizer, on_text),
        )
    return finish(output[0, len(prompt) :].tolist(), template)
