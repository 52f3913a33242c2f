"""NEFTune (arXiv 2310.05914): uniform noise on the embeddings during training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.model.causal_lm import CausalLM


class EmbeddingNoise:
    """Uniform noise of alpha / sqrt(L * D) on the embeddings within `over`, none outside.

    L is the length of the token's document, D the size of an embedding.
    """

    def __init__(self, causal_lm: CausalLM, alpha: float) -> None:
        self.alpha = alpha
        self._lengths: Tensor | None = None
        embeddings = causal_lm.base.get_input_embeddings()
        self._hook = embeddings.register_forward_hook(self._add)

    def remove(self) -> None:
        """Leave the model as it was."""
        self._hook.remove()

    @contextmanager
    def over(self, lengths: Tensor) -> Iterator[None]:
        """Noise in the passes inside; `lengths` [T] of each packed token's document."""
        self._lengths = lengths
        try:
            yield
        finally:
            self._lengths = None

    def _add(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        if self._lengths is None:
            return output
        size = self.alpha / (self._lengths.float() * output.shape[-1]).sqrt()
        noise = torch.rand_like(output, dtype=torch.float32) * 2 - 1
        return output + (noise * size[:, None]).to(output.dtype)
