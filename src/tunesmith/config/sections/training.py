"""The recipe's sections `batch`, `optim` and `train`: batch size, optimizer, length of the run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tunesmith.config.sections.base import Count, Momentum, Number, Section, one_of

Factor = Annotated[Number, Field(ge=0)]


class BatchSection(Section):
    """What one optimizer step learns from."""

    documents: Count | None = Field(
        default=None,
        ge=1,
        description="global batch size: documents per optimizer step, over all ranks and "
        "micro-batches; 32 if batch.tokens is not given",
    )
    tokens: Count | None = Field(
        default=None,
        ge=1,
        description="global batch size in tokens instead: documents are taken until their tokens "
        "reach this number; shared prefixes count in each document",
    )
    packing: Literal["none", "bfd", "bfd_split", "wrapped"] = Field(
        default="none",
        description="sequence packing: documents in packs of at most pack_tokens tokens, where a "
        "pack counts as one document of the step. bfd: best-fit decreasing, and longer documents "
        "are truncated; bfd_split: longer documents are split; wrapped: all documents as one "
        "stream, cut into packs of equal length",
    )
    pack_tokens: Count | None = Field(
        default=None, ge=2, description="tokens per pack; data.max_length if not given"
    )
    group_by_prefix: bool = Field(
        default=False,
        description="put documents with the same prefix into the same step, so that the prefix is "
        "computed once; the order of the steps is shuffled",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_size(cls, values: Any) -> Any:
        return one_of(values, "batch", {"documents": 32, "tokens": None})

    @model_validator(mode="after")
    def _one_way(self) -> BatchSection:
        if self.pack_tokens is not None and self.packing == "none":
            raise ValueError("batch.pack_tokens has no effect without batch.packing")
        if self.group_by_prefix and self.packing != "none":
            raise ValueError(
                "batch.group_by_prefix and batch.packing each decide which documents are in a "
                "step; give one"
            )
        return self


class OptimSection(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "adamw_8bit", "adafactor", "lion", "muon", "sgd"] = Field(
        default="adamw", description="optimizer"
    )
    lr: Literal["auto"] | Annotated[Number, Field(gt=0)] = Field(
        default="auto",
        description="peak learning rate; auto: 2e-4 for adapters, else 1e-4 to 2e-5 by the model's "
        "size",
    )
    betas: tuple[Momentum, Momentum] = Field(
        default=(0.9, 0.999),
        description="AdamW and Lion: decay rates of the two running means",
    )
    momentum: Momentum = Field(default=0.95, description="Muon and SGD: decay rate of the momentum")
    eps: Number = Field(
        default=1e-8,
        gt=0,
        description="AdamW: number added to the square root of the second moment",
    )
    weight_decay: Number = Field(
        default=0.0,
        ge=0,
        description="decoupled weight decay; norms, biases and embeddings are not decayed",
    )
    lr_factors: dict[str, Factor] = Field(
        default_factory=dict[str, Factor],
        description="factors on the learning rate of some parameters: {embeddings, head, lora_b or "
        "a regular expression on parameter names: factor}",
    )
    schedule: Literal["cosine", "linear", "constant", "exponential", "quarter_cosine", "wsd"] = (
        Field(default="cosine", description="learning-rate schedule after the warm-up")
    )
    min_lr: Number = Field(
        default=0.0,
        ge=0,
        le=1,
        description="learning rate at the end of the schedule, as a fraction of optim.lr",
    )
    decay: Number = Field(
        default=0.2,
        gt=0,
        le=1,
        description="wsd (warm-up, stable, decay): fraction of the steps after the warm-up in "
        "which the rate decays",
    )
    warmup: Number = Field(
        default=0.03,
        ge=0,
        description="warm-up: below 1 a fraction of all steps, else a number of steps",
    )
    max_grad_norm: Number | None = Field(
        default=1.0,
        gt=0,
        description="gradient clipping: largest global norm of the gradients; null: no clipping",
    )


class TrainSection(Section):
    """How long the run is, its seed, and which weights it keeps."""

    epochs: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="epochs (passes over the data); 3 if train.steps is not given"
    )
    steps: Count | None = Field(
        default=None, ge=1, description="optimizer steps, instead of epochs"
    )
    seed: Count = Field(
        default=42,
        ge=0,
        lt=2**32,
        description="random seed of the order of the data, of new weights and of dropout",
    )
    result: Literal["last", "best"] = Field(
        default="last",
        description="which weights become model/: those of the last step, or those with the lowest "
        "loss on data.eval",
    )
    non_finite: Literal["stop", "skip"] = Field(
        default="stop",
        description="what happens at a step whose loss or gradient is NaN or infinite: the run "
        "stops, or the step is skipped and counted",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_length(cls, values: Any) -> Any:
        return one_of(values, "train", {"epochs": 3, "steps": None})
