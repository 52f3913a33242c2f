"""Router logits of mixture-of-experts models, and the load-balancing loss (Switch Transformer,
arXiv 2101.03961).

Letters: T packed tokens, E experts, U paths (each a document's way from its first token to a last).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k")


class Routers:
    """The routers of a model; within `recorded` their logits are kept, one [T, E] a layer.

    Raises:
        ModelError: the model has no routers, or they don't give logits.
    """

    def __init__(self, causal_lm: CausalLM) -> None:
        recorder = (getattr(causal_lm.decoder, "_can_record_outputs", None) or {}).get(
            "router_logits"
        )
        kind = getattr(recorder, "target_class", None)
        found = [m for m in causal_lm.decoder.modules() if kind and isinstance(m, kind)]
        if not found:
            raise ModelError(
                "this model has no expert routers that give their logits",
                where="objective.router_aux",
                hint="take objective.router_aux away",
            )
        config = causal_lm.config.get_text_config()
        names = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
        self.top_k = next(int(value) for value in names if value)
        self._index = int(getattr(recorder, "index", 0) or 0)
        self._logits: list[Tensor] | None = None
        self._hooks = [module.register_forward_hook(self._keep) for module in found]

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """The list that a forward pass inside fills."""
        self._logits = found = []
        try:
            yield found
        finally:
            self._logits = None  # recomputing layers in the backward must not add to it

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self._logits is not None:
            logits = output[self._index] if isinstance(output, tuple) else output
            self._logits.append(logits.reshape(-1, logits.shape[-1]))


def balance_loss(logits: Sequence[Tensor], member: Tensor, *, top_k: int) -> Tensor:
    """Load balancing loss of each path, [U]: E * sum over experts of (share of its tokens' choices)
    * (mean probability), over all layers (Fedus et al., arXiv 2101.03961, eq. 4-6).

    Shapes: logits [T, E] of each layer, member [U, T] true where a token is on a path.
    """
    chosen = probability = torch.zeros((), device=member.device)
    for layer in logits:
        p = layer.float().softmax(-1)
        best = p.detach().topk(top_k, -1).indices
        # one_hot would look at the indices first, which a GPU would have to be waited for
        chosen = chosen + torch.zeros_like(p).scatter(1, best, 1.0)
        probability = probability + p
    on = member.float()
    tokens = on.sum(1, keepdim=True) * len(logits)
    return (on @ chosen / tokens * (on @ probability / tokens)).sum(1) * logits[0].shape[1]
