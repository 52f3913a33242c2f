"""The kinds of adapters, each as peft's configuration of it.

lora (Hu et al., arXiv 2106.09685), rslora (2312.03732), dora (2402.09353), pissa (2404.02948),
olora (2406.01775), loftq (2310.08659), vera (2310.11454), oft (2306.07280, in the block form of
2506.19847), boft (2311.06243), ia3 (2205.05638), loha (2108.06098), lokr (2309.14859), hra
(2405.17484), miss (2409.15371).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunesmith.model.adapters.targets import Candidates

CHANGE_BASE = ("pissa", "olora")
"""Take their beginning out of the weights they go on, so that the model starts as it was."""
ON_EXPERTS = ("lora", "rslora")
ON_EMBEDDING = ("lora", "rslora")
ON_QUANTIZED = (
    "lora", "rslora", "dora", "loftq", "ia3", "vera", "oft", "loha", "lokr", "miss",
)  # fmt: skip
"""Go beside or around a map and leave its weight alone; the others would rewrite it, step by step
or at the start.
"""
READ_SHAPES = ("loha", "lokr")
"""Are made to the shape of a map's weight, as the tensor itself shows it."""
ON_ANY_HEAD = ("lora", "rslora", "pissa", "olora", "loftq")
"""Can be on a head of 16-bit weights; others would lose small changes to rounding there."""
WITH_ROWS = ("lora", "rslora", "dora")
"""Can train new rows of the vocabulary beside them."""
OFT_BLOCK, BOFT_BLOCK = 32, 4
_DOWN = ("down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out", "ff_out", "mlp.c_proj")


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """An adapter as it is asked for; what a kind has no use for is not looked at."""

    kind: str = "lora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float])
    rotation_size: int | None = None  # of oft and boft
    svd_iterations: int | None = None  # of pissa; None: the whole decomposition


@dataclass(frozen=True, slots=True)
class Places:
    """What the adapter goes on, in peft's words."""

    modules: list[str]
    parameters: list[str]
    transposed: bool  # weights are [in, out]
    rows: Mapping[str, list[int]] | None = None  # of the vocabulary, trained beside it


Maker = Callable[[AdapterSpec, Places], Any]


def peft_config(spec: AdapterSpec, places: Places) -> Any:
    """peft's configuration of the adapter."""
    return MAKERS[spec.kind](spec, places)


def _lora(spec: AdapterSpec, places: Places, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=spec.rank,
        lora_alpha=spec.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=spec.dropout,
        target_modules=places.modules,
        target_parameters=places.parameters or None,
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),  # pyright: ignore[reportArgumentType]
        fan_in_fan_out=places.transposed,
        trainable_token_indices=None if places.rows is None else dict(places.rows),
        **more,
    )


def _pissa(spec: AdapterSpec, places: Places) -> Any:
    fast = spec.svd_iterations
    start: Any = "pissa" if fast is None else f"pissa_niter_{fast}"
    return _lora(spec, places, init_lora_weights=start)


def _vera(spec: AdapterSpec, places: Places) -> Any:
    from peft import VeraConfig

    return VeraConfig(
        r=spec.rank,
        vera_dropout=spec.dropout,
        fan_in_fan_out=places.transposed,
        save_projection=True,
        **_common(places),
    )


def _oft(spec: AdapterSpec, places: Places) -> Any:
    from peft import OFTConfig

    size = spec.rotation_size or OFT_BLOCK
    return OFTConfig(r=0, oft_block_size=size, fan_in_fan_out=places.transposed, **_common(places))


def _boft(spec: AdapterSpec, places: Places) -> Any:
    from peft import BOFTConfig

    size = spec.rotation_size or BOFT_BLOCK
    return BOFTConfig(boft_block_size=size, fan_in_fan_out=places.transposed, **_common(places))


def _ia3(spec: AdapterSpec, places: Places) -> Any:
    """Outputs are scaled, and the input of what leads out of a feed-forward, as in the paper."""
    from peft import IA3Config

    down = [name for name in places.modules if name.endswith(_DOWN)]
    return IA3Config(feedforward_modules=down, fan_in_fan_out=places.transposed, **_common(places))


def _loha(spec: AdapterSpec, places: Places) -> Any:
    from peft import LoHaConfig

    return LoHaConfig(r=spec.rank, alpha=spec.alpha, **_patterns(spec), **_common(places))  # pyright: ignore[reportArgumentType]


def _lokr(spec: AdapterSpec, places: Places) -> Any:
    from peft import LoKrConfig

    return LoKrConfig(r=spec.rank, alpha=spec.alpha, **_patterns(spec), **_common(places))  # pyright: ignore[reportArgumentType]


def _hra(spec: AdapterSpec, places: Places) -> Any:
    from peft import HRAConfig

    return HRAConfig(r=spec.rank, **_common(places))


def _miss(spec: AdapterSpec, places: Places) -> Any:
    from peft import MissConfig

    return MissConfig(r=spec.rank, **_common(places))


def _common(places: Places) -> dict[str, Any]:
    return {"task_type": "CAUSAL_LM", "target_modules": places.modules}


def _patterns(spec: AdapterSpec) -> dict[str, Any]:
    return {
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": dict(spec.alpha_pattern),
    }


MAKERS: dict[str, Maker] = {
    "lora": _lora,
    "rslora": lambda spec, places: _lora(spec, places, use_rslora=True),
    "dora": lambda spec, places: _lora(spec, places, use_dora=True),
    "pissa": _pissa,
    "olora": lambda spec, places: _lora(spec, places, init_lora_weights="olora"),
    "loftq": _lora,  # the start is put in afterwards, from the unquantised weights
    "vera": _vera,
    "oft": _oft,
    "boft": _boft,
    "ia3": _ia3,
    "loha": _loha,
    "lokr": _lokr,
    "hra": _hra,
    "miss": _miss,
}


def kind_of(config: Any) -> str:
    """The kind whose configuration this is; peft's own name for kinds that aren't here."""
    name = str(config.peft_type.value).lower()
    if name != "lora":
        return name
    if config.use_dora:
        return "dora"
    if config.use_rslora:
        return "rslora"
    start = str(config.init_lora_weights).lower()
    return next((kind for kind in CHANGE_BASE if start.startswith(kind)), "lora")


def described(config: Any) -> dict[str, Any]:
    """Rank, alpha and the other fields of a recipe's adapter, read from peft's configuration."""
    kind = kind_of(config)
    found: dict[str, Any] = {"kind": kind}
    names = {"r": "rank", "lora_alpha": "alpha", "alpha": "alpha", "lora_dropout": "dropout",
             "vera_dropout": "dropout", "rank_pattern": "rank_pattern",
             "alpha_pattern": "alpha_pattern", "oft_block_size": "rotation_size",
             "boft_block_size": "rotation_size"}  # fmt: skip
    for theirs, ours in names.items():
        value = getattr(config, theirs, None)
        if value is not None and not (kind == "oft" and theirs == "r"):
            found[ours] = value
    return found


def unfit_places(spec: AdapterSpec, chosen: Candidates) -> tuple[str, str] | None:
    """(name, what it is) of a target that this kind can't go on."""
    if chosen.experts and spec.kind not in ON_EXPERTS:
        return chosen.experts[0], "expert tensors"
    if chosen.embedding and spec.kind not in ON_EMBEDDING:
        return chosen.embedding, "the embedding"
    return None
