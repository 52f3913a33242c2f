"""Target modules of an adapter: linear layers and fused experts of the decoder, by one rule for
every family.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM, outside_decoder

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTERS = ("router", "shared_expert_gate")


@dataclass(frozen=True, slots=True)
class Candidates:
    """What an adapter can go on: linear maps by module name, expert tensors by parameter name.

    `outer` are the embedding and the head, which only a target that names them takes.
    """

    linear: tuple[str, ...]
    experts: tuple[str, ...]
    embedding: str | None = None
    head: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.linear + self.experts + self.outer

    @property
    def outer(self) -> tuple[str, ...]:
        return tuple(name for name in (self.embedding, self.head) if name is not None)

    @property
    def modules(self) -> tuple[str, ...]:
        """All that are modules: everything but expert tensors."""
        return self.linear + self.outer

    def keep(self, wanted: Any) -> Candidates:
        """Those whose name `wanted` is true of."""
        return Candidates(
            tuple(filter(wanted, self.linear)),
            tuple(filter(wanted, self.experts)),
            self.embedding if self.embedding and wanted(self.embedding) else None,
            self.head if self.head and wanted(self.head) else None,
        )


def candidates(causal_lm: CausalLM, *, without: Collection[str] = ()) -> Candidates:
    """Every linear map and expert tensor of the decoder, by its name in the transformers model;
    embedding and head beside them. Those whose parameters are in `without` are left out.
    """
    from transformers.pytorch_utils import Conv1D

    base, decoder = causal_lm.base, causal_lm.decoder
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    prefix = f"{prefix}." if prefix else ""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    counts = expert_counts(causal_lm.config)
    linear = [
        prefix + name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not _is_router(name, module, bool(counts))
        and f"{prefix}{name}.weight" not in without
    ]
    experts = [
        prefix + name
        for name, parameter in decoder.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] in counts and prefix + name not in without
    ]
    return Candidates(
        tuple(linear),
        tuple(experts),
        embedding=_name_of(base, embedding, nn.Embedding),
        head=_name_of(base, head, nn.Linear),
    )


def expert_counts(config: Any) -> set[int]:
    """Numbers of experts that the config names; empty for a dense model."""
    text = config.get_text_config()
    values = (getattr(text, name, None) for name in _EXPERT_COUNTS)
    return {value for value in values if isinstance(value, int) and value > 1}


def missed_experts(
    causal_lm: CausalLM, found: Candidates, *, without: Collection[str] = ()
) -> list[str]:
    """Weights of the decoder's experts, by parameter name, that are not among the candidates."""
    base = causal_lm.base
    outside = {*outside_decoder(causal_lm), *without}
    covered = {*found.experts, *(f"{name}.weight" for name in found.linear)}
    convolutions = tuple(
        name for name, module in base.named_modules() if type(module).__name__.startswith("Conv")
    )
    return [
        name
        for name, parameter in base.named_parameters()
        if (parameter.ndim == 3 or (parameter.ndim == 2 and "experts" in name.split(".")))
        and not name.endswith("bias")
        and name not in covered
        and name not in outside
        and name.rsplit(".", 1)[0] not in convolutions
    ]


def choose(found: Candidates, targets: str | Sequence[str]) -> Candidates:
    """What of `found` the recipe's `targets` name.

    `all-linear` is every linear map and expert tensor of the decoder; another string is a regular
    expression that must match a whole name; a list holds endings of names.

    Raises:
        ModelError: a target matches nothing.
    """
    if targets == "all-linear":
        chosen = Candidates(found.linear, found.experts)
    elif isinstance(targets, str):
        pattern = compiled(targets, where="adapter.targets")
        chosen = found.keep(lambda name: pattern.fullmatch(name) is not None)
    else:
        for ending in targets:
            if not any(_ends(name, ending) for name in found.names):
                raise ModelError(
                    f"{ending!r} matches nothing", where="adapter.targets", hint=_offer(found)
                )
        chosen = found.keep(lambda name: any(_ends(name, ending) for ending in targets))
    if not chosen.names:
        raise ModelError(
            f"{targets!r} matches nothing", where="adapter.targets", hint=_offer(found)
        )
    return chosen


def compiled(pattern: str, *, where: str) -> re.Pattern[str]:
    """The user's regular expression.

    Raises:
        ModelError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ModelError(f"is no regular expression: {error}", where=where) from error


def kinds_of(names: Sequence[str]) -> Counter[str]:
    """How many names end in each last part."""
    return Counter(name.rsplit(".", 1)[-1] for name in names)


def _name_of(base: nn.Module, wanted: object, kind: type[nn.Module]) -> str | None:
    if not isinstance(wanted, kind):
        return None
    return next(name for name, module in base.named_modules() if module is wanted)


def _is_router(name: str, module: nn.Module, experts: bool) -> bool:
    parts = name.split(".")
    return (
        "Router" in type(module).__name__
        or any(part in _ROUTERS for part in parts)
        or (experts and parts[-1] in ("gate", "wg"))
    )


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _offer(found: Candidates) -> str:
    kinds = ", ".join(kinds_of(found.names))
    return (
        f"names end in: {kinds}; a whole one: {found.names[0]}"
        if found.names
        else "this model has no linear map"
    )
