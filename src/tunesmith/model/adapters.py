"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) through peft, with one rule of what they go
on in every family.

The additions have the dtype of the model they go on, so that they cost no casts in each layer; the
optimizer keeps float32 masters of them, so their updates are as accurate as float32 parameters'
would be.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTERS = ("router", "shared_expert_gate")
_FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class AdapterReport:
    """What is trained. `kinds` counts what the adapter is on by the last part of its name."""

    names: tuple[str, ...]
    kinds: Mapping[str, int]
    trained: int  # parameters
    total: int  # parameters, the trained ones among them

    @property
    def share(self) -> float:
        """Trained parameters of all parameters."""
        return self.trained / self.total

    def __str__(self) -> str:
        text = f"{self.trained:,} of {self.total:,} parameters are trained ({self.share:.2%})"
        if self.kinds:
            text += ": " + ", ".join(f"{kind} x{count}" for kind, count in self.kinds.items())
        return text


@dataclass(frozen=True, slots=True)
class Candidates:
    """What an adapter can go on: linear maps by module name, expert tensors by parameter name."""

    linear: tuple[str, ...]
    experts: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return self.linear + self.experts


def add_lora(
    causal_lm: CausalLM,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
) -> AdapterReport:
    """Freeze the model and put trainable low-rank additions on `targets`, scaled by alpha / rank.

    `targets`: `all-linear` is every linear map and expert tensor of the decoder, never a router or
    the head; another string is a regular expression that must match a whole name; a list holds
    endings of names. A model that came with an adapter of the same rank and alpha goes on with that
    one.

    Raises:
        ModelError: a target matches nothing, or the family can't take this adapter.
    """
    if hasattr(causal_lm.model, "peft_config"):
        return _go_on(causal_lm, rank=rank, alpha=alpha)
    from peft import LoraConfig, get_peft_model

    found = candidates(causal_lm)
    chosen = _choose(found, targets)
    if chosen.experts and dropout:
        raise ModelError(
            f"dropout can't be put before expert tensors ({chosen.experts[0]})",
            where="adapter.dropout",
            hint="adapter.dropout=0, or adapter.targets without the experts",
        )
    modules, parameters = _peft_names(causal_lm, chosen)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=_transposed(causal_lm, chosen.linear),
    )
    name = getattr(causal_lm.config, "_name_or_path", None)
    try:
        causal_lm.model = get_peft_model(causal_lm.base, config, autocast_adapter_dtype=False)
    except (ValueError, NotImplementedError) as error:
        raise ModelError(f"peft refuses this adapter: {error}", where=name) from error
    adapted = _adapted(causal_lm)
    if set(adapted) != set(chosen.names):
        wrong = sorted(set(adapted) ^ set(chosen.names))
        raise ModelError(f"peft adapts other parts than asked, {wrong[0]} among them", where=name)
    return _report(causal_lm, chosen.names)


def load_adapter(model: Any, folder: Path) -> Any:
    """The peft model of `model` with the adapter in `folder`, trainable, in the model's dtype."""
    from peft import PeftModel

    try:
        loaded = PeftModel.from_pretrained(
            model, str(folder), is_trainable=True, autocast_adapter_dtype=False
        )
    except (ValueError, OSError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(
            f"the adapter can't be loaded: {str(error).splitlines()[0]}", where=str(folder)
        ) from error
    return loaded


def full_report(causal_lm: CausalLM) -> AdapterReport:
    """What full fine-tuning trains: all parameters that are not frozen."""
    return _report(causal_lm, ())


def candidates(causal_lm: CausalLM) -> Candidates:
    """Every linear map and expert tensor of the decoder, by its name in the transformers model."""
    from transformers.pytorch_utils import Conv1D

    base, decoder = causal_lm.base, causal_lm.decoder
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    prefix = f"{prefix}." if prefix else ""
    head = base.get_output_embeddings()
    counts = expert_counts(causal_lm.config)
    linear = [
        prefix + name
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not head
        and not _is_router(name, module, bool(counts))
    ]
    experts = [
        prefix + name
        for name, parameter in decoder.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] in counts
    ]
    return Candidates(tuple(linear), tuple(experts))


def expert_counts(config: Any) -> set[int]:
    """Numbers of experts that the config names; empty for a dense model."""
    text = config.get_text_config()
    values = (getattr(text, name, None) for name in _EXPERT_COUNTS)
    return {value for value in values if isinstance(value, int) and value > 1}


def _is_router(name: str, module: nn.Module, experts: bool) -> bool:
    parts = name.split(".")
    return (
        "Router" in type(module).__name__
        or any(part in _ROUTERS for part in parts)
        or (experts and parts[-1] in ("gate", "wg"))
    )


def _choose(found: Candidates, targets: str | Sequence[str]) -> Candidates:
    if targets == "all-linear":
        chosen = found
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ModelError(
                f"is no regular expression: {error}", where="adapter.targets"
            ) from error
        chosen = _keep(found, lambda name: pattern.fullmatch(name) is not None)
    else:
        for ending in targets:
            if not any(_ends(name, ending) for name in found.names):
                raise ModelError(
                    f"{ending!r} matches nothing", where="adapter.targets", hint=_offer(found)
                )
        chosen = _keep(found, lambda name: any(_ends(name, ending) for ending in targets))
    if not chosen.names:
        raise ModelError(
            f"{targets!r} matches nothing", where="adapter.targets", hint=_offer(found)
        )
    return chosen


def _keep(found: Candidates, wanted: Any) -> Candidates:
    return Candidates(tuple(filter(wanted, found.linear)), tuple(filter(wanted, found.experts)))


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _offer(found: Candidates) -> str:
    kinds = ", ".join(_kinds(found.names))
    return (
        f"names end in: {kinds}; a whole one: {found.names[0]}"
        if found.names
        else "this model has no linear map"
    )


def _kinds(names: Sequence[str]) -> Counter[str]:
    return Counter(name.rsplit(".", 1)[-1] for name in names)


def _peft_names(causal_lm: CausalLM, chosen: Candidates) -> tuple[list[str], list[str]]:
    """The chosen parts as peft's target_modules and target_parameters.

    In families with experts peft reads the module names in `_FUSED` as the experts' own of older
    checkpoints and would leave out dense and shared maps of these names; given as parameters they
    keep their meaning.
    """
    taken = _FUSED if expert_counts(causal_lm.config) else ()
    dense = [name for name in chosen.linear if name.rsplit(".", 1)[-1] in taken]
    modules = [name for name in chosen.linear if name not in dense]
    return modules, [*chosen.experts, *(f"{name}.weight" for name in dense)]


def _adapted(causal_lm: CausalLM) -> list[str]:
    """What the adapter really is on, by the names of `candidates`."""
    tuner = causal_lm.model.base_model
    names = (*tuner.targeted_module_names, *tuner.targeted_parameter_names)
    return [name.removesuffix(".weight") for name in names]


def _transposed(causal_lm: CausalLM, names: Sequence[str]) -> bool:
    """True where the linear maps keep [in, out] weights, as GPT-2's do."""
    return bool(names) and not isinstance(causal_lm.base.get_submodule(names[0]), nn.Linear)


def _go_on(causal_lm: CausalLM, *, rank: int, alpha: float) -> AdapterReport:
    config = causal_lm.model.peft_config[causal_lm.model.active_adapter]
    if (config.r, float(config.lora_alpha)) != (rank, float(alpha)):
        raise ModelError(
            f"the model comes with an adapter of rank {config.r} and alpha {config.lora_alpha},"
            f" not {rank} and {alpha}",
            where="adapter",
            hint=f"adapter.rank={config.r} adapter.alpha={config.lora_alpha}, or merge it first",
        )
    return _report(causal_lm, _adapted(causal_lm))


def _report(causal_lm: CausalLM, names: Sequence[str]) -> AdapterReport:
    parameters = list(causal_lm.parameters())
    return AdapterReport(
        names=tuple(sorted(names)),
        kinds=dict(sorted(_kinds(names).items())),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(p.numel() for p in parameters),
    )
