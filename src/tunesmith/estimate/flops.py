"""Floating point operations of training, from the model's shape (6 per parameter and token, plus
attention).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.packed_weight import parameter_count


def training_flops(model: CausalLM, *, tokens: int, targets: int) -> float:
    """Operations of the products with weights in the forward and backward pass of `tokens` computed
    tokens with `targets` distinct targets.

    With m the weights of the decoder's matrices that a token meets and h those of the head:
    tokens * (4 m_frozen + 6 m_trained) + targets * (4 or 6) h. Each weight is multiplied and added
    once forward (2), once for the gradient of its input (2), and, if it is trained, once for its
    own (2). Of stacked experts a token meets the share that the router chooses. Not counted are
    lookups, attention's scores, element by element work, what is computed twice to save memory, and
    passes of a base model.
    """
    head = model.head.weight
    embedding = model.base.get_input_embeddings().weight
    outside = {id(head), id(embedding)}
    met = _expert_share(model)
    per_token = 0.0
    for parameter in model.parameters():
        if parameter.dim() > 1 and id(parameter) not in outside:
            share = met if parameter.dim() == 3 else 1.0
            per_token += share * parameter_count(parameter) * _each(parameter)
    return per_token * tokens + float(parameter_count(head) * _each(head)) * targets


def _each(parameter: Tensor) -> int:
    """Operations a weight: two forward, two for its input's gradient, two for its own."""
    return 6 if parameter.requires_grad else 4


def _expert_share(model: CausalLM) -> float:
    """The share of the experts that a token goes through; 1 without experts."""
    config: Any = model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    count = next((value for name in names if (value := getattr(config, name, None))), None)
    return chosen / count if chosen and count else 1.0
