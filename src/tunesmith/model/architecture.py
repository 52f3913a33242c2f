"""The transformers class of a checkpoint: the one that `config.architectures` names, as
`from_pretrained` of that class reads it.

An auto class may choose another: for a multimodal checkpoint `AutoModelForCausalLM` often makes the
text part alone, whose tensors have other names than those of the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tunesmith.errors import ModelError

_AUTO = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Auto classes that know models which write text, besides `AutoModelForCausalLM`."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model class of transformers, or the auto class that imports a model's own code."""

    maker: Any
    custom_code: bool = False

    def from_pretrained(self, folder: Any, config: Any, **options: Any) -> Any:
        """The model with its weights; with `output_loading_info` what was found in the files."""
        if self.custom_code:
            options["trust_remote_code"] = True
        return self.maker.from_pretrained(folder, config=config, **options)

    def from_config(self, config: Any, **options: Any) -> Any:
        """The model without its weights."""
        if self.custom_code:
            return self.maker.from_config(config, trust_remote_code=self.custom_code, **options)
        return self.maker._from_config(config, **options)


def find_architecture(config: Any, where: str, *, trust_remote_code: bool = False) -> Architecture:
    """The class of a model with this configuration.

    Raises:
        ModelError: no class that writes text is known for it.
    """
    import transformers

    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return Architecture(transformers.AutoModelForCausalLM, custom_code=True)
    for name in getattr(config, "architectures", None) or []:
        named = getattr(transformers, name, None)
        if _fits(named, config):
            return Architecture(named)
    autos = [getattr(transformers, name) for name in _AUTO if hasattr(transformers, name)]
    # Of a composite configuration AutoModelForCausalLM knows the text part alone.
    composite = config.get_text_config() is not config
    autos.insert(len(autos) if composite else 0, transformers.AutoModelForCausalLM)
    for auto in autos:
        if type(config) in auto._model_mapping:
            return Architecture(auto._model_mapping[type(config)])
    raise ModelError(f"{config.model_type} is no causal language model", where=where)


def _fits(named: Any, config: Any) -> bool:
    """Whether it is a model class with a language-model head for this very configuration."""
    from transformers import PreTrainedModel

    if not isinstance(named, type) or not issubclass(named, PreTrainedModel):
        return False
    headless = named.__name__.endswith(("Model", "PreTrainedModel"))
    return not headless and getattr(named, "config_class", None) is type(config)


def empty_model(
    config: Any, where: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Any:
    """The model on the meta device, its weights tied as those of a loaded one.

    Raises:
        ModelError: the configuration makes no model.
    """
    architecture = find_architecture(config, where, trust_remote_code=trust_remote_code)
    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        model = architecture.from_config(config, **options)
    model.tie_weights()
    return model
