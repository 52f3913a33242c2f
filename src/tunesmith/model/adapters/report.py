"""Trainable parameters: counted for the user, and frozen where the recipe leaves them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from tunesmith.errors import ModelError
from tunesmith.model.adapters.targets import compiled, kinds_of
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.ops.packed_weight import parameter_count


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


def full_report(causal_lm: CausalLM) -> AdapterReport:
    """What full fine-tuning trains: all parameters that are not frozen."""
    return report(causal_lm, ())


def report(causal_lm: CausalLM, names: Sequence[str]) -> AdapterReport:
    """The report of an adapter on `names`."""
    parameters = list(causal_lm.parameters())
    return AdapterReport(
        names=tuple(sorted(names)),
        kinds=dict(sorted(kinds_of(names).items())),
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(parameter_count(p) for p in parameters),
    )


def freeze(
    causal_lm: CausalLM, *, parameters: str | None = None, top_layers: int | None = None
) -> AdapterReport:
    """Freeze all but the parameters whose whole name `parameters` matches, or all but the last
    `top_layers` layers and what comes after them: the final norm, and a head of its own.

    Raises:
        ModelError: nothing would be trained, or there are fewer layers.
    """
    base = causal_lm.base
    names = [name for name, _ in base.named_parameters()]
    if parameters is not None:
        pattern = compiled(parameters, where="adapter.parameters")
        chosen = {name for name in names if pattern.fullmatch(name)}
        if not chosen:
            raise ModelError(
                f"{parameters!r} matches no parameter",
                where="adapter.parameters",
                hint=f"whole names are matched, as {names[0]} or {names[-1]}",
            )
    else:
        assert top_layers is not None
        chosen = _top(causal_lm, top_layers)
    # parameters() names a tied tensor once: where it is the embedding, so it counts as that
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in chosen)
    modules = {name.rsplit(".", 1)[0] for name in chosen}
    return report(causal_lm, sorted(modules))


def _top(causal_lm: CausalLM, count: int) -> set[str]:
    base, decoder = causal_lm.base, causal_lm.decoder
    layers = _layers(causal_lm)
    if count > len(layers):
        raise ModelError(
            f"the model has {len(layers)} layers, not {count}", where="adapter.top_layers"
        )
    kept = {id(p) for layer in list(layers)[len(layers) - count :] for p in layer.parameters()}
    inside = {id(p) for layer in layers for p in layer.parameters()}
    embeddings = {
        id(p)
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
    }
    read = {id(p) for part in (decoder, causal_lm.head) for p in part.parameters()}
    outside = read - inside - embeddings
    return {name for name, p in base.named_parameters() if id(p) in kept | outside}


def _layers(causal_lm: CausalLM) -> nn.ModuleList:
    """The decoder's layers: the list of as many modules as the config counts."""
    count = causal_lm.config.get_text_config().num_hidden_layers
    for module in causal_lm.decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"the layers of {causal_lm.config.model_type} can't be told apart",
        where="adapter.top_layers",
        hint="adapter.parameters takes a regular expression on parameter names",
    )
