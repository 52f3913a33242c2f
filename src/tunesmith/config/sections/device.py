"""The recipe's section `device`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.fields import Number
from tunesmith.config.sections.base import Count, Section


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
    attention: Literal["auto", "sdpa", "unpacked"] = Field(
        default="auto",
        description="sdpa: packed, by torch's own kernels; unpacked: one path at a time, by the "
        "model's own attention",
    )
    kernels: Literal["auto", "torch", "liger"] = Field(
        default="auto",
        description="what computes norms and gated units: liger, Liger's kernels where a trial "
        "shows them right; torch, the model's own operations; auto: liger on CUDA if installed",
    )
    compile: Literal["none", "layers"] = Field(
        default="none",
        description="layers: the decoder's layers are compiled by torch, without their attention, "
        "where a trial shows them right",
    )
    gradient_checkpointing: (
        Literal["auto", "none", "layers", "selective"] | bool | Annotated[Count, Field(ge=1)]
    ) = Field(
        default="auto",
        description="recompute activations to save memory: none, layers, N for every N-th layer, "
        "selective for all but products and attention; true is layers, false none",
    )
    activation_offload: bool = Field(
        default=False, description="keep activations in the host's memory until the backward pass"
    )
    paged_optimizer: bool = Field(
        default=False,
        description="let the optimizer's state rest outside of the device's memory between steps: "
        "on a CPU in a file that the system pages, else in the host's memory",
    )
    deterministic: bool = Field(
        default=True, description="only kernels that give the same bits each time"
    )
    threads: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto", description="CPU threads"
    )
    watchdog: Literal["auto"] | Annotated[Number, Field(gt=0)] | None = Field(
        default="auto",
        description="minutes without a micro-batch, save or evaluation after which the run is "
        "ended and its stacks are written; auto: 60, or 20 times the longest so far",
    )
    cache: bool | str = Field(
        default=True,
        description="keep prepared documents for the next run: true, false or a folder; true is "
        "TUNESMITH_CACHE, else the user's cache folder",
    )
    num_proc: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto",
        description="processes that prepare the data; auto: more than one where it takes long",
    )
    ranks: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto",
        description="processes that learn together on this machine, where torchrun starts none; "
        "auto: one for each GPU",
    )
    rank_timeout: Annotated[Number, Field(gt=0)] = Field(
        default=30.0,
        description="minutes that a rank waits for the others, in a step or for a save, before it "
        "calls them lost",
    )
    context_parallel: Annotated[Count, Field(ge=1)] = Field(
        default=1,
        description="how many ranks share the tokens of each micro-batch, for sequences that do "
        "not fit one device; divides the ranks and the model's attention heads",
    )
    tensor_parallel: Annotated[Count, Field(ge=1)] = Field(
        default=1,
        description="how many ranks hold one copy of the layers, each a part of every linear map; "
        "divides the ranks and the model's attention heads",
    )
    shard: Literal["none", "full", "hybrid"] = Field(
        default="none",
        description="what several ranks hold of the model: none, each all of it; full, each a "
        "part; hybrid, each a part of its machine's copy",
    )
    shard_offload: bool = Field(
        default=False, description="keep shards and optimizer in the host's memory"
    )
