"""The data types that pass between the stages: documents, layouts, batches, losses, step metrics.

All are frozen, and arrays are never changed in place. Letters of shapes: T packed tokens of a
micro-batch, N distinct targets of a micro-batch, M (target, document) pairs, n tokens of a segment,
k targets of a segment, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
NO_MESSAGE = -1
"""The message number of a target that belongs to no message (plain text)."""


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """The origin of a row: `source` as the user named it, and `row` counted from 0 inside it."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens that continues its parent segment, with its loss mask.

    The target `ids[index[j]]` with `weight[j]` > 0 is predicted from the token before it on its
    path: `ids[index[j] - 1]`, or the parent's last token where `index[j]` is 0 (a root has no
    target at 0).
    """

    ids: IntArray  # [n] token ids, n >= 1
    parent: int  # number of the segment this one continues, -1 for a root
    start: int  # position of ids[0]: number of tokens of all its ancestors
    index: IntArray  # [k] places in ids that are targets, ascending
    weight: FloatArray  # [k] weight of each target, > 0
    message: IntArray  # [k] number of the message each target belongs to, NO_MESSAGE for text


@dataclass(frozen=True, slots=True)
class Document:
    """A rendered row: a tree of segments, parents before children; after `too_long: split` several
    trees.
    """

    segments: tuple[Segment, ...]
    origin: Origin

    @property
    def tokens(self) -> int:
        """The number of tokens of all segments."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def target_tokens(self) -> int:
        """The number of targets of all segments."""
        return sum(len(segment.index) for segment in self.segments)

    @property
    def longest_path(self) -> int:
        """The tokens from a root to the end of its deepest leaf, which `max_length` bounds."""
        return max(segment.start + len(segment.ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Chain:
    """A contiguous run [start, end) of packed tokens with causal attention, which also sees all of
    `prefix`.

    `prefix` lists the [start, end) spans of its ancestors in path order; their lengths sum to the
    position of the chain's first token.
    """

    start: int
    end: int
    prefix: tuple[tuple[int, int], ...]


class SequenceShard(Protocol):
    """Context parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): this rank's shard of the tokens of
    a layout, and the all-to-all that exchanges it for a shard of the heads.

    Letters: H heads, h heads of a rank, T tokens, t tokens of a rank, D head size.
    """

    @property
    def local(self) -> slice:
        """The tokens of this rank."""
        ...

    def seq_to_heads(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All-to-all from [1, H, t, D], this rank's tokens, to [1, h, T, D], this rank's heads."""
        ...

    def heads_to_seq(self, output: Tensor) -> Tensor:
        """All-to-all from [1, h, T, D] back to [1, H, t, D]."""
        ...

    def local_heads(self, values: Tensor) -> Tensor:
        """The entries [h] of this rank's heads, from [H]."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """The attention mask of a micro-batch: a forest of token runs, laid out depth first (tree
    attention).

    Token q sees token k exactly when k <= q < visible_until[k]. `chains` cover [0, T) in order and
    define the same mask. With `shard` this process holds a shard of the T tokens.
    """

    chains: tuple[Chain, ...]
    visible_until: IntArray  # [T]
    position: IntArray  # [T]
    shard: SequenceShard | None = None

    @property
    def local(self) -> slice:
        """The tokens of this process."""
        return slice(0, len(self.position)) if self.shard is None else self.shard.local

    @property
    def flat(self) -> bool:
        """True if no chain continues another: documents side by side, without branches."""
        return all(not chain.prefix for chain in self.chains)


@dataclass(frozen=True, slots=True)
class TargetOwners:
    """Which documents of the step each distinct target belongs to; shared prefixes share
    targets.
    """

    target: IntArray  # [M] index of the target, < N
    document: IntArray  # [M] index of the document in the step's list
    weight: FloatArray  # [M]; the weight of a target is the sum over its documents


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch on its device, without padding: the tokens of the forest once each, and the
    targets.

    `layout` is None where the model can't take one: the batch is then a single sequence and runs
    through the model's own attention.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    layout: Layout | None
    source: Tensor  # [N] int64: the packed token that must predict
    target: Tensor  # [N] int64: the id it must predict
    weight: Tensor  # [N] float32
    owners: TargetOwners


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The result of the loss head for a micro-batch. Sums, not means, so that micro-batches and
    ranks add up.
    """

    loss_sum: Tensor  # scalar float32, differentiable: sum of weight * loss
    weight_sum: Tensor  # scalar float32
    token_loss: Tensor  # [N] float32, detached: the objective's loss of each target, unweighted
    stats: Mapping[
        str, Tensor
    ]  # scalars float32: sums of weight * (accuracy | entropy | logprob | ...)
    log_effective_weight: Tensor | None = (
        None  # [N]: log(strength / p(target)), NaN where it isn't known
    )


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """The metrics of one optimizer step. Times in seconds, memory in bytes."""

    step: int  # counted from 1
    epoch: float  # epochs completed after this step
    loss: float  # sum(weight * loss) / sum(weight) over the whole step
    lr: float
    grad_norm: float  # before clipping
    documents: int
    tokens: int  # of the step's documents; shared prefixes count in each
    computed_tokens: int  # tokens that went through the decoder
    target_tokens: int
    weight_sum: float
    seconds: float
    tokens_per_second: float  # tokens / seconds
    stats: Mapping[str, float]  # weighted means: accuracy, entropy, logprob, ...
    peak_memory: int

    def record(self) -> dict[str, Any]:
        """The metrics as one flat object, a line of metrics.jsonl."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "stats"}
        return {"kind": "train", **fields, **self.stats}


HeadLoss = Callable[..., LossOutput]
"""The loss head with its objective: (hidden, weight, bias, *, source, target, target_weight,
transform).
"""
