"""Parameters that no row of text reaches, found in autograd's graph: vision and audio towers of a
multimodal model, and layers of its decoder that only see images.

They stay as they are and travel with the model. Weight decay would shrink them otherwise, since
their gradient is zero.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.selftest_probe import batch_of, native

_TOKENS = 9


def unreached_by_text(causal_lm: CausalLM) -> frozenset[str]:
    """Names of the base's parameters that a short row of text does not reach.

    A parameter that asks for a gradient is reached if autograd's graph leads to it, any other if
    its module runs. An expert that the row is not sent to counts as reached if others of its kind
    are.
    """
    base, weight = causal_lm.base, causal_lm.head.weight
    ids = torch.arange(_TOKENS, device=weight.device) + weight.shape[0] // 4
    ran: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda one, _: ran.add(id(one)))
        for module in base.modules()
    ]
    try:
        with native(causal_lm), torch.enable_grad():
            hidden = causal_lm.hidden(batch_of(ids, torch.arange(_TOKENS), None))
    finally:
        for hook in hooks:
            hook.remove()
    seen = {id(p) for p in (*_leaves(hidden), *causal_lm.head.parameters())}
    for module in base.modules():
        if id(module) in ran:
            frozen = (p for p in module.parameters(recurse=False) if not p.requires_grad)
            seen |= {id(p) for p in frozen}
    named = dict(base.named_parameters())
    kinds = {_kind(name) for name, p in named.items() if id(p) in seen}
    return frozenset(
        name
        for name, p in named.items()
        if id(p) not in seen and not ("experts" in name and _kind(name) in kinds)
    )


def freeze_unreached(causal_lm: CausalLM, names: Collection[str]) -> list[str]:
    """Freeze these parameters of the base; a line that says which, if there are any."""
    named = dict(causal_lm.base.named_parameters())
    for name in names:
        named[name].requires_grad_(False)
    if not names:
        return []
    count = sum(named[name].numel() for name in names)
    parts = outermost(causal_lm.base, names)
    more = f" and {len(parts) - 4} more" if len(parts) > 4 else ""
    return [
        f"frozen, since no text reaches them: {count:,} parameters in "
        f"{', '.join(parts[:4])}{more}; adapter.parameters trains by name"
    ]


def outermost(base: nn.Module, names: Collection[str]) -> list[str]:
    """The largest modules all of whose parameters are among `names`, by name."""
    parts: dict[str, None] = {}
    whole = _whole_modules(base, frozenset(names))
    for name in sorted(names):
        path = name.split(".")
        prefixes = (".".join(path[:end]) for end in range(1, len(path)))
        parts[next((prefix for prefix in prefixes if prefix in whole), name)] = None
    return list(parts)


def _whole_modules(base: nn.Module, names: frozenset[str]) -> set[str]:
    found: set[str] = set()
    for prefix, module in base.named_modules():
        inside = [f"{prefix}.{name}" for name, _ in module.named_parameters()]
        if prefix and inside and names.issuperset(inside):
            found.add(prefix)
    return found


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _leaves(output: Tensor) -> Iterable[Tensor]:
    """The parameters that autograd's graph of `output` ends in."""
    waiting: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]
