"""Attach a peft adapter to a model, continue one that it came with, or load one.

The additions have the dtype of the model they go on, so that they cost no casts in each layer; the
optimizer keeps float32 masters of them, so their updates are as accurate as float32 parameters'
would be.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.errors import ModelError, first_line
from tunesmith.model.adapters.fused_lora import fuse_low_rank
from tunesmith.model.adapters.initialization import (
    began_quantized,
    begin_with_loftq,
    taken_from_base,
)
from tunesmith.model.adapters.keys import refuse_other_keys
from tunesmith.model.adapters.kinds import (
    CHANGE_BASE,
    ON_ANY_HEAD,
    ON_QUANTIZED,
    READ_SHAPES,
    WITH_ROWS,
    AdapterSpec,
    Places,
    described,
    peft_config,
    unfit_places,
)
from tunesmith.model.adapters.report import AdapterReport, report
from tunesmith.model.adapters.state import NO_ADAPTER, AdapterState
from tunesmith.model.adapters.targets import (
    Candidates,
    candidates,
    choose,
    expert_counts,
    missed_experts,
)
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.packed_weight import is_packed, is_quantized
from tunesmith.model.resize_embeddings import trained_rows

_FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True, slots=True)
class AttachedAdapter:
    """What is trained of a model with an adapter, and what its export must know."""

    report: AdapterReport
    state: AdapterState


def add_adapter(
    causal_lm: CausalLM,
    spec: AdapterSpec,
    loaded: AdapterState = NO_ADAPTER,
    *,
    asked: Collection[str] = (),
    unreached: Collection[str] = (),
) -> AttachedAdapter:
    """Freeze the model and put a trainable adapter on what `spec.targets` name.

    A model that came with an adapter goes on with that one; `asked` names the fields of `spec` it
    must then agree with. `loaded` is the state that loading the model returned.

    Raises:
        ModelError: a target matches nothing, or the family can't take this adapter.
    """
    if has_adapter(causal_lm):
        return AttachedAdapter(_go_on(causal_lm, spec, loaded, asked), loaded)
    from peft import get_peft_model

    found = candidates(causal_lm, without=unreached)
    chosen = choose(found, spec.targets)
    whole = spec.targets == "all-linear"
    missed = missed_experts(causal_lm, found, without=unreached) if whole else []
    if missed:
        raise ModelError(
            f"{len(missed)} weights of experts have an unknown form, {missed[0]} for one",
            where="adapter.targets",
            hint="a list of name endings leaves them out",
        )
    _refuse_unfit(causal_lm, spec, chosen, loaded.new_rows)
    places = _places(causal_lm, spec, chosen, loaded.new_rows)
    name = getattr(causal_lm.config, "_name_or_path", None)
    try:
        causal_lm.replace_model(
            get_peft_model(causal_lm.base, peft_config(spec, places), autocast_adapter_dtype=False)
        )
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        raise ModelError(f"peft refuses this adapter: {first_line(error)}", where=name) from error
    names = adapted_names(causal_lm)
    if set(names) != set(chosen.names):
        wrong = sorted(set(names) ^ set(chosen.names))
        raise ModelError(
            f"peft adapts other parts than asked, {wrong[0]} among them",
            where=name,
            hint="adapter.targets names the parts to adapt",
        )
    _cast_additions(causal_lm.model)
    fuse_low_rank(causal_lm.model)
    start = taken_from_base(causal_lm, spec.kind)
    if spec.kind == "loftq":
        begin_with_loftq(causal_lm)
    state = replace(loaded, start=start, of_quantized=spec.kind == "loftq")
    return AttachedAdapter(report(causal_lm, chosen.names), state)


def load_adapter(model: Any, folder: Path, *, trainable: bool = True) -> tuple[Any, AdapterState]:
    """The peft model of `model` with the adapter in `folder`, trainable, in the model's dtype; and
    the adapter's state.

    Raises:
        ModelError: it can't be read, or its weights are not those of this model.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # an error below
            loaded = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, autocast_adapter_dtype=False
            )
    except Exception as error:  # a config with wrong values fails anywhere in peft
        raise ModelError(
            f"the adapter can't be loaded: {first_line(error)}", where=str(folder)
        ) from error
    refuse_other_keys(loaded, folder)
    _cast_additions(loaded)
    fuse_low_rank(loaded)
    return loaded, AdapterState(of_quantized=began_quantized(folder))


def _cast_additions(model: Any) -> None:
    """peft can't take the dtype from a quantised weight and leaves its additions in float32."""
    dtype = model.get_base_model().dtype
    for module in model.modules():
        if is_quantized(getattr(module, "base_layer", None)):
            for name, parameter in module.named_parameters():
                if not name.startswith("base_layer.") and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)


def refuse_plain_base(causal_lm: CausalLM, adapter: AdapterState) -> None:
    """Raises:
    ModelError: the model's adapter stands for an error that its base does not have.
    """
    if adapter.of_quantized and not any(map(is_quantized, causal_lm.base.modules())):
        raise ModelError(
            "the adapter began with what quantising took from its base, and this base is plain",
            where="model.quantization",
            hint="the model.quantization that the adapter was trained with",
        )


def has_adapter(causal_lm: CausalLM) -> bool:
    """True for a model with an adapter on it."""
    return hasattr(causal_lm.model, "peft_config")


def adapter_config(causal_lm: CausalLM) -> Any:
    """peft's configuration of the adapter in use."""
    return causal_lm.model.peft_config[causal_lm.model.active_adapter]


def adapter_fields(causal_lm: CausalLM, adapter: AdapterState) -> dict[str, Any]:
    """Kind, rank and so on of the adapter on the model, named as in a recipe."""
    found = described(adapter_config(causal_lm))
    return {**found, "kind": "loftq"} if adapter.of_quantized else found


def adapted_names(causal_lm: CausalLM) -> list[str]:
    """What the adapter really is on, by the names of `candidates`."""
    tuner = causal_lm.model.base_model
    names = (*tuner.targeted_module_names, *getattr(tuner, "targeted_parameter_names", ()))
    return [name.removesuffix(".weight") for name in names]


def _refuse_unfit(
    causal_lm: CausalLM, spec: AdapterSpec, chosen: Candidates, new_rows: Sequence[int]
) -> None:
    unfit = unfit_places(spec, chosen)
    if unfit is not None:
        kinds = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in chosen.linear))
        raise ModelError(
            f"{spec.kind} can't go on {unfit[1]} ({unfit[0]})",
            where="adapter.kind",
            hint=f"adapter.kind=lora, or adapter.targets=[{', '.join(kinds)}]",
        )
    folded = chosen.experts[:1] or (chosen.head,)
    if folded[0] and spec.dropout:
        what = "expert tensors" if chosen.experts else "the head"
        raise ModelError(
            f"dropout can't be put before {what} ({folded[0]})",
            where="adapter.dropout",
            hint="adapter.dropout=0, or adapter.targets without them",
        )
    _refuse_quantized(causal_lm, spec)
    _refuse_rows(causal_lm, spec, chosen, new_rows)
    for where in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(spec, where):
            _check_pattern(pattern, chosen.names, where=f"adapter.{where}")


def _refuse_quantized(causal_lm: CausalLM, spec: AdapterSpec) -> None:
    """What a kind can't be put on, or makes no sense on, by how the base is kept."""
    quantized = any(is_quantized(module) for module in causal_lm.base.modules())
    if quantized and spec.kind not in ON_QUANTIZED:
        raise ModelError(
            f"{spec.kind} needs the base's plain weights, and they are quantised",
            where="adapter.kind",
            hint=f"one of {', '.join(ON_QUANTIZED)}; or model.quantization=none",
        )
    if spec.kind == "dora" and any(is_packed(module) for module in causal_lm.base.modules()):
        raise ModelError(
            "dora reads the base's weights, and peft can't read torchao's 4 bits",
            where="adapter.kind",
            hint="model.quantization=nf4, or adapter.kind=lora",
        )
    if spec.kind in READ_SHAPES and any(map(_hides_shape, causal_lm.base.modules())):
        raise ModelError(
            f"{spec.kind} asks peft for the weights' shape, and bitsandbytes' 4 bits don't show it",
            where="adapter.kind",
            hint="model.quantization=int8 or torchao_int4, or adapter.kind=lora",
        )
    if spec.kind == "loftq" and not quantized:
        raise ModelError(
            "loftq begins with what quantising the base took away, and this base is not quantised",
            where="adapter.kind",
            hint="add model.quantization=nf4, or adapter.kind=lora or pissa",
        )


def _hides_shape(module: nn.Module) -> bool:
    """True for a linear map whose weight is packed into a tensor of another shape."""
    return isinstance(module, nn.Linear) and module.weight.shape != (
        module.out_features,
        module.in_features,
    )


def _refuse_rows(
    causal_lm: CausalLM, spec: AdapterSpec, chosen: Candidates, new_rows: Sequence[int]
) -> None:
    """What an adapter can't do to the embedding and the head."""
    base = causal_lm.base
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    if spec.kind in CHANGE_BASE and chosen.head and tied:
        raise ModelError(
            f"{spec.kind} takes its beginning out of the head, which is the embedding too",
            where="adapter.targets",
            hint=f"adapter.kind=lora, or adapter.targets without {chosen.head}",
        )
    rounded = base.get_output_embeddings().weight.dtype != torch.float32
    if chosen.head and rounded and spec.kind not in ON_ANY_HEAD:
        raise ModelError(
            f"small changes that {spec.kind} makes to a 16-bit head would be rounded away",
            where="adapter.targets",
            hint=f"adapter.kind=lora, model.dtype=float32, or targets without {chosen.head}",
        )
    if new_rows and (spec.kind not in WITH_ROWS or chosen.outer):
        what = f"{spec.kind} can't go" if not chosen.outer else "an adapter can't be on them"
        raise ModelError(
            f"the template's new tokens train rows of embedding and head, and {what} beside that",
            where="adapter.targets" if chosen.outer else "adapter.kind",
            hint="adapter.kind=lora on the decoder's maps, as adapter.targets=all-linear",
        )


def _check_pattern(pattern: str, names: Collection[str], *, where: str) -> None:
    try:
        found = any(re.match(rf"(.*\.)?({pattern})$", name) for name in names)
    except re.error as error:
        raise ModelError(f"{pattern!r} is no regular expression: {error}", where=where) from error
    if not found:
        raise ModelError(
            f"{pattern!r} matches none of the adapter's targets",
            where=where,
            hint="a name's ending, or a regular expression for it, as layers.0.self_attn.q_proj",
        )


def _places(
    causal_lm: CausalLM, spec: AdapterSpec, chosen: Candidates, new_rows: Sequence[int]
) -> Places:
    """The chosen parts as peft's target_modules and target_parameters.

    In families with experts peft reads the module names in `_FUSED` as the experts' own of older
    checkpoints and would leave out dense and shared maps of these names; given as parameters they
    keep their meaning.
    """
    taken = _FUSED if expert_counts(causal_lm.config) and spec.kind in ("lora", "rslora") else ()
    dense = [name for name in chosen.linear if name.rsplit(".", 1)[-1] in taken]
    modules = [name for name in chosen.modules if name not in dense]
    return Places(
        modules,
        [*chosen.experts, *(f"{name}.weight" for name in dense)],
        transposed=_transposed(causal_lm, chosen.linear),
        rows=trained_rows(causal_lm, new_rows),
    )


def _transposed(causal_lm: CausalLM, names: tuple[str, ...]) -> bool:
    """True where the linear maps keep [in, out] weights, as GPT-2's do."""
    return bool(names) and not isinstance(causal_lm.base.get_submodule(names[0]), nn.Linear)


def _go_on(
    causal_lm: CausalLM, spec: AdapterSpec, loaded: AdapterState, asked: Collection[str]
) -> AdapterReport:
    there = adapter_fields(causal_lm, loaded)
    for name in asked:
        mine, found = getattr(spec, name), there.get(name)
        if name in there and mine != found:
            raise ModelError(
                f"the model comes with an adapter of {name} {found}, not {mine}",
                where=f"adapter.{name}",
                hint=f"adapter.{name}={found}, or merge it first: tunesmith merge",
            )
    if "targets" in asked and spec.targets != "all-linear":
        _refuse_other_targets(causal_lm, spec)
    return report(causal_lm, adapted_names(causal_lm))


def _refuse_other_targets(causal_lm: CausalLM, spec: AdapterSpec) -> None:
    there = set(adapted_names(causal_lm))
    names = Candidates(tuple(sorted(there)), ())
    if set(choose(names, spec.targets).names) != there:
        raise ModelError(
            "the model comes with an adapter on other parts than these",
            where="adapter.targets",
            hint="take the key away, or merge it first: tunesmith merge",
        )
