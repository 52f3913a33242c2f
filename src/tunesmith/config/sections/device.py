"""The recipe's section `device`: hardware, memory, parallelism. It never changes what is
learned.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.config.sections.base import Count, Number, Section


class DeviceSection(Section):
    """Where and how fast the run computes; results agree within rounding, whatever is chosen."""

    kind: Literal["auto", "cpu", "cuda", "mps", "xpu"] = Field(
        default="auto", description="device; auto: the accelerator if there is one, else the CPU"
    )
    micro_tokens: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto",
        description="tokens per micro-batch (gradient accumulation); auto: what the memory holds",
    )
    share_prefixes: Literal["auto"] | bool = Field(
        default="auto",
        description="prefix sharing: compute a prefix once that several documents of a step begin "
        "with; auto: yes, unless random numbers are drawn per token (dropout, NEFTune, scheduled "
        "sampling)",
    )
    attention: Literal["auto", "sdpa", "unpacked"] = Field(
        default="auto",
        description="sdpa: documents packed into one sequence, by torch's attention kernels; "
        "unpacked: one sequence at a time, by the model's own attention",
    )
    kernels: Literal["auto", "torch", "liger"] = Field(
        default="auto",
        description="implementation of norms and gated units: Liger kernels, used where a trial "
        "shows that they are right, or the model's own operations; auto: liger on CUDA if "
        "installed",
    )
    compile: Literal["none", "layers"] = Field(
        default="none",
        description="layers: regional torch.compile of the decoder layers without their attention, "
        "used where a trial shows that it is right",
    )
    gradient_checkpointing: (
        Literal["auto", "none", "layers", "selective"] | bool | Annotated[Count, Field(ge=1)]
    ) = Field(
        default="auto",
        description="activation checkpointing. none or false: no recomputation; layers or true: "
        "recompute every decoder layer; N: every N-th layer; selective: keep the outputs of matrix "
        "products and attention; auto: what the memory needs",
    )
    activation_offload: bool = Field(
        default=False,
        description="activation offloading: keep activations in host memory until the backward "
        "pass",
    )
    paged_optimizer: bool = Field(
        default=False,
        description="paged optimizer: keep the optimizer's state outside of device memory between "
        "steps, on a GPU in host memory, on a CPU in a memory-mapped file",
    )
    deterministic: bool = Field(
        default=True,
        description="deterministic algorithms of torch only, so that a run repeated gives the same "
        "bits",
    )
    threads: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto", description="CPU threads of torch"
    )
    watchdog: Literal["auto"] | Annotated[Number, Field(gt=0)] | None = Field(
        default="auto",
        description="minutes without a finished micro-batch, save or evaluation after which the "
        "run writes the stacks of its threads and ends; auto: 60, or 20 times the longest so far; "
        "null: never",
    )
    cache: bool | str = Field(
        default=True,
        description="cache of prepared documents: true, false or a folder; true is the folder "
        "TUNESMITH_CACHE, else the user's cache folder",
    )
    num_proc: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto",
        description="worker processes for data preparation; auto: one per CPU once it takes longer "
        "than their start",
    )
    ranks: Literal["auto"] | Annotated[Count, Field(ge=1)] = Field(
        default="auto",
        description="ranks (training processes) on this machine, if torchrun starts none; auto: "
        "one for each GPU",
    )
    rank_timeout: Annotated[Number, Field(gt=0)] = Field(
        default=30.0,
        description="minutes that a rank waits in a collective operation before the run fails",
    )
    context_parallel: Annotated[Count, Field(ge=1)] = Field(
        default=1,
        description="context parallelism (DeepSpeed-Ulysses): ranks that split the sequence of "
        "each micro-batch; must divide the ranks and the model's attention heads",
    )
    tensor_parallel: Annotated[Count, Field(ge=1)] = Field(
        default=1,
        description="tensor parallelism (Megatron): ranks that split every linear layer; must "
        "divide the ranks and the model's attention heads",
    )
    shard: Literal["none", "full", "hybrid"] = Field(
        default="none",
        description="FSDP2: none replicates the model (DDP), full shards it over all ranks "
        "(FULL_SHARD), hybrid shards it inside a node (HYBRID_SHARD)",
    )
    shard_offload: bool = Field(
        default=False,
        description="FSDP2 CPU offload: keep the shards of weights and optimizer state in host "
        "memory",
    )
