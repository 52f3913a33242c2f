"""Load a causal language model with our attention, and refuse what would not be the model asked
for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from tunesmith.errors import ModelError, first_line, is_out_of_memory, out_of_memory
from tunesmith.model.adapters.state import NO_ADAPTER, AdapterState
from tunesmith.model.architecture import Architecture, find_architecture
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM, find_decoder
from tunesmith.model.layers import cut_layers
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.ops.bf16_upcast import upcast_linear_layers
from tunesmith.model.ops.dtype import DtypeChoice, choose_dtype
from tunesmith.model.ops.malloc import freed_at_once
from tunesmith.model.quantization.dequantize import check_readable
from tunesmith.model.quiet import quiet
from tunesmith.model.recurrent.replace import follow_layouts
from tunesmith.model.source import (
    ModelSource,
    read_json,
    refuse_foreign_code,
    resolve_model,
)
from tunesmith.model.weight_files import WeightFiles
from tunesmith.module_swap import restore_all

if TYPE_CHECKING:
    from tunesmith.model.quantization.load import Quantization

__all__ = [
    "DtypeChoice",
    "LoadedModel",
    "ModelSource",
    "choose_dtype",
    "load_causal_lm",
    "resolve_model",
    "settings_kept",
    "wrap_causal_lm",
]

_NOISE = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "dropout_rate",
    "drop_rate",
    "layerdrop",
    "jitter_noise",
)
# phimoe's routing compares gates with this value in evaluation too: there it is no noise
_NO_NOISE = {("phimoe", "router_jitter_noise")}
_NOT_CAUSAL = (
    "MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering",
    "MultipleChoice",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, and what loading it found out."""

    model: CausalLM
    notes: Sequence[str]  # what was decided, in words
    adapter: AdapterState = NO_ADAPTER  # of the adapter that the model came with
    unread: WeightFiles | None = None  # where the weights are, of a model without them


def load_causal_lm(
    source: ModelSource,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
    layers: int | None = None,
) -> LoadedModel:
    """The model of `source` on `device`, with its adapter trainable on top if it has one;
    randomness in it set to 0. With `quantization` each weight is quantised as it is read.

    `layers`: only so many of the first.

    Raises:
        ModelError: not a causal language model, foreign code without leave, or missing weights.
    """
    config = checked_config(source, trust_remote_code)
    if layers is not None:
        cut_layers(config, layers)
    chosen = choose_dtype(dtype, device)
    notes = [chosen.note, *published_as(source), *silence(config)]
    options: dict[str, Any] = {"dtype": chosen.dtype}
    if quantization is not None:
        from tunesmith.model.quantization.load import loading_options

        options |= loading_options(
            quantization,
            config,
            dtype=chosen.dtype,
            device=torch.device(device),
            trust_remote_code=trust_remote_code,
        )
    with nullcontext() if quantization is None else freed_at_once():
        model = _from_pretrained(source, config, trust_remote_code, options)
    if quantization is None:
        model = model.to(torch.device(device))
    causal_lm = _wrapped(model)
    adapter = NO_ADAPTER
    if source.adapter_folder is not None:
        from tunesmith.model.adapters import load_adapter
        from tunesmith.model.resize_embeddings import make_room_for_adapter

        make_room_for_adapter(model, source.adapter_folder)
        adapted, adapter = load_adapter(model, source.adapter_folder)
        causal_lm.replace_model(adapted)
    if quantization is not None:
        from tunesmith.model.quantization.load import finish_loading

        notes.append(finish_loading(causal_lm, quantization))
    return LoadedModel(causal_lm, [*notes, *finish(causal_lm)], adapter)


def wrap_causal_lm(model: Any) -> LoadedModel:
    """A model the user has loaded, plain or wrapped by peft; its attention is exchanged,
    `settings_kept` gives it back.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    _refuse_config(base.config, type(base).__name__)
    notes = silence(base.config)
    notes += _silence_modules(base)
    causal_lm = _wrapped(model)
    return LoadedModel(causal_lm, [*notes, *finish(causal_lm)])


def _wrapped(model: Any) -> CausalLM:
    """A transformers or peft model as a CausalLM with our attention."""
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    if not hasattr(base, "get_output_embeddings") or base.get_output_embeddings() is None:
        raise ModelError(
            f"{type(base).__name__} has no language-model head",
            hint="load it as AutoModelForCausalLM",
        )
    causal_lm = CausalLM(
        model,
        logits=read_logit_transform(base.config.get_text_config()),
        native_attention=find_decoder(base).config._attn_implementation or "eager",
    )
    _use_our_attention(causal_lm)
    return causal_lm


@contextmanager
def settings_kept(model: Any) -> Iterator[None]:
    """Afterwards the user's model has the attention, cache setting and mode it came with; None has
    none.
    """
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    config = getattr(base, "config", None)
    if config is None:
        yield
        return
    decoder = find_decoder(base) if hasattr(base, "get_decoder") else base
    native, training = decoder.config._attn_implementation, model.training
    cache = getattr(config, "use_cache", True)
    try:
        yield
    finally:
        restore_all(model)
        decoder.set_attn_implementation(native)
        config.use_cache = cache
        model.train(training)


def finish(causal_lm: CausalLM) -> list[str]:
    """Give the model what every model is given once it is loaded; what is to be said of it."""
    notes: list[str] = []
    causal_lm.base.config.use_cache = False
    if upcast_linear_layers(causal_lm):
        notes.append("this CPU has no bfloat16 units: kept in bfloat16, multiplied in float32")
    if not causal_lm.unpacked:
        followed = follow_layouts(causal_lm.decoder)
        if followed and causal_lm.head.weight.device.type != "cpu":
            notes.append(
                "recurrent layers are packed by torch operations, without the kernels of fla, "
                "mamba-ssm and causal-conv1d: many small launches; device.attention=unpacked uses "
                "the kernels, one path at a time"
            )
    else:
        notes.append(
            f"{causal_lm.config.model_type} does not take another attention: one path at a time"
        )
    return notes


def checked_config(source: ModelSource, trust_remote_code: bool) -> Any:
    """The model's configuration.

    Raises:
        ModelError: it is of no causal language model, or can't be used as it is.
    """
    from transformers import AutoConfig

    raw = read_json(source.folder / "config.json")
    check_readable(raw, source.name)
    refuse_foreign_code(source, trusted=trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # each config class checks its values with errors of its own
        kind = raw.get("model_type")
        known = f"architecture {kind!r} is unknown to the installed transformers"
        message = known if kind else "config.json names no model_type"
        if "does not recognize" not in str(error) and kind:
            message = f"its config.json is refused: {first_line(error)}"
        raise ModelError(
            message, where=source.name, hint="a newer transformers may know it"
        ) from error
    _without_quantization(config)
    _refuse_config(config, source.name)
    return config


def _without_quantization(config: Any) -> None:
    """The configuration of the plain weights that quantised files are read as."""
    for part in (config, config.get_text_config()):
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config


def published_as(source: ModelSource) -> list[str]:
    """A line on the quantisation of a model's files, if there is one."""
    kind = check_readable(read_json(source.folder / "config.json"), source.name)
    return [] if kind is None else [f"published in {kind}: read as bfloat16 weights"]


def _refuse_config(config: Any, where: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{config.model_type} is an encoder-decoder model; only decoders can be trained",
            where=where,
        )
    for architecture in getattr(config, "architectures", None) or []:
        if architecture.endswith(_NOT_CAUSAL):
            raise ModelError(f"{architecture} is no causal language model", where=where)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            "is quantised; its weights can't be trained as they are",
            where=where,
            hint="give the unquantised model; model.quantization=nf4 quantises it while it is read",
        )


def silence(config: Any) -> list[str]:
    """Set every source of noise in a config to 0; one note a changed value."""
    notes: list[str] = []
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in filter(None, parts):
        for key, value in list(vars(part).items()):
            if not key.endswith(_NOISE) or not isinstance(value, int | float) or not value:
                continue
            if isinstance(value, bool):  # of esm: whether embeddings are scaled, without chance
                continue
            if (part.model_type, key) in _NO_NOISE:
                continue
            setattr(part, key, 0.0)
            notes.append(f"{key} {value} in the model's config is set to 0")
    return notes


def _silence_modules(model: Any) -> list[str]:
    """The same for modules already made from the config; dropout of an adapter stays, it was asked
    for.
    """
    changed = 0
    for name, module in model.named_modules():
        if any(part in name for part in ("lora_", "vera_", "oft_", "boft_")):
            continue
        if isinstance(module, torch.nn.Dropout) and module.p:
            module.p, changed = 0.0, changed + 1
        for key, value in list(vars(module).items()):
            if key.endswith(_NOISE) and isinstance(value, float) and value:
                kind = getattr(getattr(module, "config", model.config), "model_type", "")
                if (kind, key) not in _NO_NOISE:
                    setattr(module, key, 0.0)
                    changed += 1
    return [f"dropout of {changed} modules is set to 0"] if changed else []


def _from_pretrained(source: ModelSource, config: Any, trust: bool, options: Any) -> Any:
    """The transformers model, of the class that its configuration names."""
    try:
        architecture = find_architecture(config, source.name, trust_remote_code=trust)
        with quiet():
            model, info = _read(architecture, source, config, options)
        _refuse_missing(model, info, source)
        return model
    except ModelError:
        raise
    except Exception as error:  # a config with a wrong number fails anywhere in the model's code
        if is_out_of_memory(error):
            raise out_of_memory() from error
        raise ModelError(f"can't be loaded: {first_line(error)}", where=source.name) from error


def _read(architecture: Architecture, source: ModelSource, config: Any, options: Any) -> Any:
    """The model, and what was found in the files; of quantised ones, each tensor is dequantised."""
    options = {"output_loading_info": True, **options}
    if check_readable(read_json(source.folder / "config.json"), source.name) is None:
        # Without `use_safetensors` a pickle beside them might be read.
        return architecture.from_pretrained(source.folder, config, use_safetensors=True, **options)
    files = WeightFiles(source.folder)
    state = {name: files.tensor(name) for name in files.names}
    model, info = architecture.from_pretrained(None, config, state_dict=state, **options)
    model.config._name_or_path = str(source.folder)
    read_generation_config(model, source)
    return model, info


def read_generation_config(model: Any, source: ModelSource) -> None:
    """Give a model that was not read from its folder the generation settings that lie there."""
    from transformers import GenerationConfig

    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)


def _use_our_attention(causal_lm: CausalLM) -> None:
    """Exchange the decoder's attention, or leave the model unpacked where it takes no other."""
    attention.register()
    try:
        taken = causal_lm.set_attention(attention.NAME)
    except (ValueError, KeyError, ImportError):
        taken = False
    if not taken:
        causal_lm.run_unpacked()


def _refuse_missing(model: Any, info: Any, source: ModelSource) -> None:
    missing = sorted(info.get("missing_keys") or [])
    mismatched = sorted(
        str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys") or []
    )
    if missing or mismatched:
        names = missing + mismatched
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelError(
            f"its files lack weights that {type(model).__name__} needs: "
            f"{', '.join(names[:3])}{more}",
            where=source.name,
            hint="they would start at random; is the download complete, the config the right one?",
        )
