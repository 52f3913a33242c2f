"""The recipe: every field, its type, default and meaning. `model data batch objective adapter optim train` change what is
learned; `device` changes only how fast; `checkpoint eval log` change neither.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tunesmith.config.values import Duration, EvalSource, parse_duration, parse_eval, parse_number

Number = Annotated[float, BeforeValidator(parse_number)]
"""A float; `2e-5`, which YAML 1.1 reads as a string, is one too."""

Every = Annotated[Duration, BeforeValidator(parse_duration)]
"""`200` (steps), `0.25 epoch` or `10 min`."""


class Section(BaseModel):
    """A part of the recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSection(Section):
    """The pretrained model."""

    name: str = Field(description="hub id, folder in Hugging Face format, .gguf file, or a run folder")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="precision of the forward and backward pass; updates are float32-accurate in either"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool = Field(False, description="run Python code that the model's folder brings along")


class SourceSection(Section):
    """One source of rows."""

    path: str = Field(description="file: .jsonl .json .csv .parquet")
    format: Literal["auto", "messages", "prompt_completion", "text"] = Field("auto", description="shape of the rows")
    columns: dict[str, str] | None = Field(None, description="our name: the data's name; overrides data.columns")
    limit: int | None = Field(None, ge=1, description="use only the first rows")


class DataSection(Section):
    """The demonstrations and how they become tokens."""

    train: list[SourceSection] = Field(default_factory=list, description="what is learned from, in this order")
    eval: EvalSource = Field(
        None, description="held-out data: files, {name: files}, a share of the training rows (2%) or a number of them"
    )
    columns: dict[str, str] | None = Field(None, description="our name: the data's name, e.g. {prompt: question}")
    template: str | None = Field(None, description="chat template: the model's own, a .jinja file, or none (train raw)")
    template_kwargs: dict[str, str | bool | int | float] = Field(
        default_factory=dict, description="arguments of the chat template, e.g. {enable_thinking: false}"
    )
    train_on: Literal["auto", "assistant", "last", "completion", "all"] | list[str] = Field(
        "auto", description="which tokens are targets: answers, the last answer, completions, everything, or these roles"
    )
    max_length: Literal["auto"] | Annotated[int, Field(ge=2)] = Field(
        "auto", description="longest path of a document in tokens; auto: the model's context"
    )
    too_long: Literal["error", "drop", "truncate", "split"] = Field("error", description="what to do with longer rows")
    bad_rows: Literal["error", "drop"] = Field("error", description="what to do with rows that can't be trained on")
    shuffle: bool = Field(True, description="a new seeded order each epoch; false: the order of the data")


class BatchSection(Section):
    """What one optimizer step learns from."""

    documents: int | None = Field(32, ge=1, description="documents a step, over all devices")
    tokens: int | None = Field(None, ge=1, description="instead: tokens a step, repeats counted")


class ObjectiveSection(Section):
    """The loss."""

    name: Literal["nll"] = Field("nll", description="nll: -log p(target)")


class AdapterSection(Section):
    """Which parameters are trained."""

    kind: Literal["none", "lora"] = Field("none", description="none: all parameters; lora: low-rank additions")
    rank: int = Field(16, ge=1, description="rank of the additions")
    alpha: Number = Field(32, gt=0, description="scale of the additions: alpha / rank")
    dropout: Number = Field(0.0, ge=0, lt=1, description="dropout on the additions' input")
    targets: str | list[str] = Field(
        "all-linear", description="all-linear, a regular expression on module names, or a list of name endings"
    )


class OptimSection(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = Field("adamw", description="AdamW, decoupled weight decay")
    lr: Literal["auto"] | Annotated[Number, Field(gt=0)] = Field("auto", description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")
    eps: Number = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: Number = Field(0.0, ge=0, description="not applied to norms, biases and embeddings")
    schedule: Literal["cosine", "linear", "constant", "exponential", "quarter_cosine"] = Field(
        "cosine", description="shape of the learning rate after the warm-up"
    )
    warmup: Number = Field(0.03, ge=0, description="below 1 a share of all steps, else a number of steps")
    max_grad_norm: Number | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; null: never")


class TrainSection(Section):
    """How long, from which seed, and which weights are kept."""

    epochs: Annotated[Number, Field(gt=0)] | None = Field(None, description="passes over the data; 3 where steps is not given")
    steps: int | None = Field(None, ge=1, description="instead: optimizer steps")
    seed: int = Field(42, ge=0, lt=2**32, description="of the order of the data, new weights and dropout")
    result: Literal["last", "best"] = Field("last", description="which weights become model/: best needs data.eval")

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("train.epochs and train.steps exclude each other; give one")
        return self


class DeviceSection(Section):
    """Engineering: never changes what is learned beyond rounding."""

    kind: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field("auto", description="where to run")
    micro_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="tokens that go through the device at a time"
    )
    share_prefixes: Literal["auto"] | bool = Field("auto", description="compute a prefix that rows of a step share once")
    attention: Literal["auto", "sdpa", "isolated"] = Field(
        "auto", description="sdpa: packed, by torch's own kernels; isolated: one path at a time, the model's own attention"
    )
    gradient_checkpointing: Literal["auto"] | bool = Field("auto", description="recompute activations to save memory")
    deterministic: bool = Field(True, description="only kernels that give the same bits each time")
    threads: Literal["auto"] | Annotated[int, Field(ge=1)] = Field("auto", description="CPU threads")


class CheckpointSection(Section):
    """When to save and how much to keep."""

    every: Every | None = Field(default="1 epoch", description="200 (steps), 0.25 epoch or 10 min; null: only at the end")  # pyright: ignore
    keep: int = Field(2, ge=1, description="newest checkpoints kept; the best one is spared")


class EvalSection(Section):
    """When and how held-out data is looked at."""

    every: Every | None = Field(default="1 epoch", description="200 (steps), 0.25 epoch or 10 min; null: before and after")  # pyright: ignore
    samples: int = Field(0, ge=0, description="held-out prompts answered at each evaluation, kept in samples.jsonl")
    max_new_tokens: int = Field(256, ge=1, description="longest answer of a sample")


class LogSection(Section):
    """Where the numbers go besides metrics.jsonl."""

    to: list[Literal["wandb", "tensorboard", "trackio", "mlflow"]] = Field(
        default_factory=list, description="trackers (extra `logging`)"
    )
    project: str = Field("tunesmith", description="the trackers' name for the group of runs")


class Recipe(Section):
    """A whole run."""

    model: ModelSection
    data: DataSection
    batch: BatchSection = BatchSection()
    objective: ObjectiveSection = ObjectiveSection()
    adapter: AdapterSection = AdapterSection()
    optim: OptimSection = OptimSection()
    train: TrainSection = TrainSection()
    device: DeviceSection = DeviceSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    log: LogSection = LogSection()


SCIENCE = ("model", "data", "batch", "objective", "adapter", "optim", "train")
"""Sections that change what is learned."""

MAIN_KEYS = {
    "model": "name", "data": "train", "batch": "documents", "objective": "name", "adapter": "kind", "optim": "name",
    "train": "epochs", "device": "kind", "checkpoint": "every", "eval": "every", "log": "to",
}  # fmt: skip
"""The key a scalar given for a whole section stands for: `model: M` is `model: {name: M}`."""
