"""The recipe's sections `model` and `adapter`: the pretrained model, and which parameters train."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.sections.base import Count, Number, Section

Kind = Literal[
    "none", "lora", "rslora", "dora", "pissa", "olora", "loftq", "vera", "oft", "boft", "ia3",
    "loha", "lokr", "hra", "miss",
]  # fmt: skip
Rank = Annotated[Count, Field(ge=1)]
Alpha = Annotated[Number, Field(gt=0)]

LOW_RANK = ("lora", "rslora", "dora", "pissa", "olora", "loftq")
PATTERNED = (*LOW_RANK, "loha", "lokr")
ALL = (*PATTERNED, "vera", "oft", "boft", "ia3", "hra", "miss")
FITS: dict[str, tuple[str, ...]] = {
    "rank": (*PATTERNED, "vera", "hra", "miss"),
    "alpha": PATTERNED,
    "dropout": ("lora", "rslora", "dora", "vera"),
    "targets": ALL,
    "rank_pattern": PATTERNED,
    "alpha_pattern": PATTERNED,
    "rotation_size": ("oft", "boft"),
    "svd_iterations": ("pissa",),
    "lr_ratio": LOW_RANK,
    "parameters": ("none",),
    "top_layers": ("none",),
}
"""The adapter kinds that each key has an effect on; a key that is not here has one on all."""


def fits(key: str, kind: str) -> bool:
    """True if the key of section `adapter` has an effect on this kind of adapter."""
    return kind in FITS.get(key, (*ALL, "none"))


class ModelSection(Section):
    """The pretrained model."""

    name: str = Field(
        min_length=1,
        description="hub id, folder in Hugging Face format, .gguf file, or a run folder",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="dtype of the weights, forward and backward; the optimizer's updates are exact "
        "to float32 in either",
    )
    quantization: Literal[
        "none", "nf4", "fp4", "int8", "torchao_int8", "torchao_fp8", "torchao_int4"
    ] = Field(
        default="none",
        description="quantization of the frozen base weights while an adapter is trained (QLoRA); "
        "nf4, fp4 and int8 are those of bitsandbytes",
    )
    double_quantization: bool = Field(
        default=False, description="nf4 and fp4: quantize the scales of the blocks as well"
    )
    float8: Literal["none", "rowwise"] = Field(
        default="none",
        description="rowwise: float8 training, where the decoder's linear layers multiply in "
        "float8 with one scale per row; needs an NVIDIA GPU of compute capability 8.9 or more",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(
        default=False, description="run the Python code that the model's folder contains"
    )


class AdapterSection(Section):
    """Which parameters are trained."""

    kind: Kind = Field(
        default="none",
        description="kind of adapter (peft); none: no adapter, the model's own parameters are "
        "trained",
    )
    rank: Count = Field(default=16, ge=1, description="rank r of the adapter's matrices")
    alpha: Number = Field(
        default=32,
        gt=0,
        description="scale of the adapter's output: alpha / rank; rslora: alpha / sqrt(rank)",
    )
    dropout: Number = Field(
        default=0.0, ge=0, lt=1, description="dropout probability on the adapter's input"
    )
    targets: str | list[str] = Field(
        default="all-linear",
        description="modules that get an adapter: all-linear, a regular expression on module "
        "names, or a list of the last parts of names, e.g. [q_proj, v_proj]",
    )
    rank_pattern: dict[str, Rank] = Field(
        default_factory=dict[str, Rank],
        description="other ranks for some modules: {last part of a name or regular expression: "
        "rank}",
    )
    alpha_pattern: dict[str, Alpha] = Field(
        default_factory=dict[str, Alpha],
        description="other alphas for some modules, given in the same way",
    )
    rotation_size: Count | None = Field(
        default=None,
        ge=2,
        description="oft and boft: block size of the rotations; null: 32 for oft, 4 for boft",
    )
    svd_iterations: Count | None = Field(
        default=None,
        ge=1,
        description="pissa: iterations of a fast randomized SVD, of which 16 are close to the "
        "exact one; null: the exact SVD",
    )
    lr_ratio: Number | None = Field(
        default=None, gt=0, description="LoRA+: learning rate of the B matrices divided by optim.lr"
    )
    continue_from: str | None = Field(
        default=None,
        description="run or adapter folder whose adapter is trained further, with its kind and "
        "rank",
    )
    parameters: str | None = Field(
        default=None,
        description="without an adapter: regular expression on parameter names; all other "
        "parameters are frozen",
    )
    top_layers: Count | None = Field(
        default=None,
        ge=1,
        description="without an adapter: train only this many last decoder layers, the final norm "
        "and the head",
    )
