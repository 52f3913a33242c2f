"""The recipe: every field, its type, default and meaning.

`model data batch objective adapter optim train` change what is learned; `device` changes only how
fast; `checkpoint eval log` change neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from tunesmith.config.fields import Every, Momentum, Number, Tracker
from tunesmith.config.sources import (
    Columns,
    Count,
    EvalSource,
    Section,
    Sources,
    SourceSection,
)
from tunesmith.config.values import Duration, Holdout, parse_words

__all__ = ["MAIN_KEYS", "SCIENCE", "Duration", "Holdout", "Recipe", "Section", "SourceSection"]


def _one_of(values: Any, section: str, defaults: dict[str, Any]) -> Any:
    """The values, with the default where no key of `defaults` is given; two are refused."""
    if not isinstance(values, Mapping):
        return values
    filled = dict(cast("Mapping[str, Any]", values))
    given = [key for key in defaults if filled.get(key) is not None]
    if len(given) > 1:
        names = " and ".join(f"{section}.{key}" for key in given)
        raise ValueError(f"{names} exclude each other; give one")
    if not given:
        filled.update({key: value for key, value in defaults.items() if value is not None})
    return filled


class ModelSection(Section):
    """The pretrained model."""

    name: str = Field(
        min_length=1,
        description="hub id, folder in Hugging Face format, .gguf file, or a run folder",
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        description="precision of forward and backward; updates are float32-accurate in either",
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(
        default=False, description="run Python code that the model's folder brings along"
    )


class DataSection(Section):
    """The demonstrations and how they become tokens."""

    train: Sources = Field(
        default_factory=list[SourceSection], description="what is learned from, in this order"
    )
    eval: EvalSource | None = Field(
        default=None,
        description="held-out data: files, {name: files}, a share of the training rows (2%) or "
        "a number of them",
    )
    columns: Columns | None = Field(
        default=None, description="our name: the data's name, e.g. {prompt: question}"
    )
    template: str | None = Field(
        default=None,
        description="chat template: the model's own, a .jinja file, or none (train raw)",
    )
    template_kwargs: dict[str, str | bool | int | float] = Field(
        default_factory=dict,
        description="arguments of the chat template, e.g. {enable_thinking: false}",
    )
    train_on: Literal["auto", "assistant", "last", "completion", "all"] | list[str] = Field(
        default="auto",
        description="which tokens are targets: answers, the last answer, completions, everything, "
        "or what these roles say",
    )
    max_length: Literal["auto"] | Annotated[Count, Field(ge=2)] = Field(
        default="auto",
        description="longest path of a document in tokens; auto: the model's context",
    )
    too_long: Literal["error", "drop", "truncate", "split"] = Field(
        default="error", description="what to do with longer rows"
    )
    bad_rows: Literal["error", "drop"] = Field(
        default="error", description="what to do with rows that can't be trained on"
    )
    shuffle: bool = Field(
        default=True, description="a new seeded order each epoch; false: the order of the data"
    )


class BatchSection(Section):
    """What one optimizer step learns from."""

    documents: Count | None = Field(
        default=None,
        ge=1,
        description="documents a step, over all devices; 32 where tokens is not given",
    )
    tokens: Count | None = Field(
        default=None, ge=1, description="instead: tokens a step, repeats counted"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        return _one_of(values, "batch", {"documents": 32, "tokens": None})


class ObjectiveSection(Section):
    """The loss."""

    name: Literal["nll"] = Field(default="nll", description="nll: -log p(target)")


class AdapterSection(Section):
    """Which parameters are trained."""

    kind: Literal["none", "lora"] = Field(
        default="none", description="none: all parameters; lora: low-rank additions"
    )
    rank: Count = Field(default=16, ge=1, description="rank of the additions")
    alpha: Number = Field(default=32, gt=0, description="scale of the additions: alpha / rank")
    dropout: Number = Field(default=0.0, ge=0, lt=1, description="dropout on the additions' input")
    targets: str | list[str] = Field(
        default="all-linear",
        description="all-linear, a regular expression on module names, or a list of name endings",
    )


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = Field(default="adamw", description="AdamW, decoupled weight decay")
    lr: Literal["auto"] | Annotated[Number, Field(gt=0)] = Field(
        default="auto", description="peak learning rate"
    )
    betas: tuple[Momentum, Momentum] = Field(
        default=(0.9, 0.999), description="decay of the two moments"
    )
    eps: Number = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: Number = Field(
        default=0.0, ge=0, description="not applied to norms, biases and embeddings"
    )
    schedule: Literal["cosine", "linear", "constant", "exponential", "quarter_cosine"] = Field(
        default="cosine", description="shape of the learning rate after the warm-up"
    )
    warmup: Number = Field(
        default=0.03, ge=0, description="below 1 a share of all steps, else a number of steps"
    )
    max_grad_norm: Number | None = Field(
        default=1.0, gt=0, description="gradients are scaled down to this norm; null: never"
    )


class TrainSection(Section):
    """How long, from which seed, and which weights are kept."""

    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="passes over the data; 3 where steps is not given"
    )
    steps: Count | None = Field(default=None, ge=1, description="instead: optimizer steps")
    seed: Count = Field(
        default=42, ge=0, lt=2**32, description="of the order of the data, new weights and dropout"
    )
    result: Literal["last", "best"] = Field(
        default="last", description="which weights become model/: best needs data.eval"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        return _one_of(values, "train", {"epochs": 3, "steps": None})


class DeviceSection(Section):
    """Engineering: never changes what is learned beyond rounding."""

    kind: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        default="auto", description="where to run"
    )
    micro_tokens: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto", description="tokens that go through the device at a time"
    )
    share_prefixes: Literal["auto"] | bool = Field(
        default="auto", description="compute a prefix that rows of a step share once"
    )
    attention: Literal["auto", "sdpa", "isolated"] = Field(
        default="auto",
        description="sdpa: packed, by torch's own kernels; isolated: one path at a time, by the "
        "model's own attention",
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        default="auto", description="recompute activations to save memory"
    )
    deterministic: bool = Field(
        default=True, description="only kernels that give the same bits each time"
    )
    threads: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto", description="CPU threads"
    )


class CheckpointSection(Section):
    """When to save and how much to keep."""

    every: Every | None = Field(
        default=Duration(1, "epochs"),
        description="200 (steps), 0.25 epoch or 10 min; null: only at the end",
    )
    keep: Count = Field(
        default=2, ge=1, description="newest checkpoints kept; the best one is spared"
    )


class EvalSection(Section):
    """When and how held-out data is looked at."""

    every: Every | None = Field(
        default=Duration(1, "epochs"),
        description="200 (steps), 0.25 epoch or 10 min; null: before and after",
    )
    samples: Count = Field(
        default=0,
        ge=0,
        description="held-out prompts answered at each evaluation, kept in samples.jsonl",
    )
    max_new_tokens: Count = Field(default=256, ge=1, description="longest answer of a sample")


class LogSection(Section):
    """Where the numbers go besides metrics.jsonl."""

    to: Annotated[list[Tracker], BeforeValidator(parse_words)] = Field(
        default_factory=list[Tracker], description="trackers (extra `logging`)"
    )
    project: str = Field(
        default="tunesmith", description="the trackers' name for the group of runs"
    )


class Recipe(Section):
    """A whole run."""

    model: ModelSection = Field(description="the pretrained model")
    data: DataSection = Field(
        default=DataSection(), description="the demonstrations and how they become tokens"
    )
    batch: BatchSection = Field(
        default=BatchSection(), description="what one optimizer step learns from"
    )
    objective: ObjectiveSection = Field(default=ObjectiveSection(), description="the loss")
    adapter: AdapterSection = Field(
        default=AdapterSection(), description="which parameters are trained"
    )
    optim: OptimSection = Field(
        default=OptimSection(), description="the optimizer and its schedule"
    )
    train: TrainSection = Field(
        default=TrainSection(), description="how long, from which seed, and which weights are kept"
    )
    device: DeviceSection = Field(
        default=DeviceSection(),
        description="where and how fast: never changes what is learned beyond rounding",
    )
    checkpoint: CheckpointSection = Field(
        default=CheckpointSection(), description="when to save and how much to keep"
    )
    eval: EvalSection = Field(
        default=EvalSection(), description="when and how held-out data is looked at"
    )
    log: LogSection = Field(
        default=LogSection(), description="where the numbers go besides metrics.jsonl"
    )

    @model_validator(mode="before")
    @classmethod
    def _main_keys(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        given = cast("Mapping[str, Any]", values)
        return {name: expand_section(name, value) for name, value in given.items()}


SCIENCE = ("model", "data", "batch", "objective", "adapter", "optim", "train")
"""Sections that change what is learned."""

MAIN_KEYS = {
    "model": "name",
    "data": "train",
    "batch": "documents",
    "objective": "name",
    "adapter": "kind",
    "optim": "name",
    "train": "epochs",
    "device": "kind",
    "checkpoint": "every",
    "eval": "every",
    "log": "to",
}
"""The key a scalar given for a whole section stands for: `model: M` is `model: {name: M}`."""


def expand_section(name: str, value: Any) -> Any:
    """The mapping that a section's short form stands for; {} where nothing is written."""
    if name not in MAIN_KEYS or isinstance(value, Mapping | Section):
        return cast(Any, value)
    return {} if value is None else {MAIN_KEYS[name]: value}
