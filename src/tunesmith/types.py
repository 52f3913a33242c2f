"""The values that pass between the stages. All are frozen; arrays are never changed in place.

Letters of shapes: T packed tokens of a micro-batch, N distinct targets of a micro-batch, M shares
of rows in targets, n tokens of a segment, k targets of a segment, V vocabulary, D hidden size.
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
"""Message number of a target that belongs to no message (plain text)."""


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Where a row came from: `source` as the user named it, `row` counted from 0 inside it."""

    source: str
    row: int

    def __str__(self) -> str:
        return f"{self.source}:{self.row}"


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that continue their parent segment, and which of them must be learned.

    The target `ids[index[j]]` is predicted, with `weight[j]` > 0, from the token before it on its
    path: `ids[index[j]-1]`, or the parent's last token where `index[j]` is 0 (a root has no target
    at 0).
    """

    ids: IntArray  # [n] token ids, n >= 1
    parent: int  # number of the segment this one continues, -1 for a root
    start: int  # position of ids[0]: number of tokens of all its ancestors
    index: IntArray  # [k] ascending places in ids that are targets
    weight: FloatArray  # [k] weight of each target, > 0
    message: IntArray  # [k] number of the message each target belongs to, NO_MESSAGE for text


@dataclass(frozen=True, slots=True)
class Document:
    """One row, rendered: a tree (or, after `split`, several trees) of segments, parents before
    children.
    """

    segments: tuple[Segment, ...]
    origin: Origin

    @property
    def tokens(self) -> int:
        """Tokens of all segments."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def target_tokens(self) -> int:
        """Targets of all segments."""
        return sum(len(segment.index) for segment in self.segments)

    @property
    def longest_path(self) -> int:
        """Tokens from a root to the end of its deepest leaf; what `max_length` bounds."""
        return max(segment.start + len(segment.ids) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Chain:
    """A contiguous run [start, end) of packed tokens that is causal in itself and sees all of
    `prefix`.

    `prefix` lists the [start, end) spans of its ancestors in path order; their lengths sum to the
    position of the chain's first token.
    """

    start: int
    end: int
    prefix: tuple[tuple[int, int], ...]


class SequenceShard(Protocol):
    """How ranks share the tokens of a layout, a slice each, and for attention its heads.

    Letters: H heads, h of a rank, T tokens, t of a rank, D head size.
    """

    @property
    def local(self) -> slice:
        """This rank's tokens."""
        ...

    def seq_to_heads(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[1, H, t, D] of this rank's tokens to [1, h, T, D] of its heads."""
        ...

    def heads_to_seq(self, output: Tensor) -> Tensor:
        """[1, h, T, D] back to [1, H, t, D]."""
        ...

    def local_heads(self, values: Tensor) -> Tensor:
        """[H] to [h]."""
        ...


@dataclass(frozen=True, slots=True)
class Layout:
    """Who sees whom among the packed tokens of a micro-batch; a forest laid out depth first.

    Token k is seen by token q exactly when k <= q < visible_until[k]. `chains` cover [0, T) in
    order and say the same. With `spread` this process has a slice of the T tokens.
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
        """True if no chain continues another: documents side by side, no branch."""
        return all(not chain.prefix for chain in self.chains)


@dataclass(frozen=True, slots=True)
class TargetOwners:
    """How distinct targets go back to the documents of the step that asked for them."""

    target: IntArray  # [M] number of the target, < N
    document: IntArray  # [M] number of the document in the list the step was planned from
    weight: FloatArray  # [M]; a target's weight is the sum of its shares


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on its device: the forest's tokens once each, and the targets at their
    sources. No padding.

    `layout` is None where the model can't take one: the batch is then a single path and runs
    through the model's own attention.
    """

    input_ids: Tensor  # [T] int64
    position_ids: Tensor  # [T] int64
    layout: Layout | None
    source: Tensor  # [N] int64: which packed token must predict
    target: Tensor  # [N] int64: the id it must predict
    weight: Tensor  # [N] float32
    owners: TargetOwners


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What the head returns for a micro-batch. Sums, never means, so that micro-batches and ranks
    add up.
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
    """What one optimizer step did. Times in seconds, memory in bytes."""

    step: int  # counted from 1
    epoch: float  # share of the data seen after this step, 1.0 = once
    loss: float  # sum(weight * loss) / sum(weight) over the whole step
    lr: float
    grad_norm: float  # before clipping
    documents: int
    tokens: int  # of the step's documents, repeats counted
    computed_tokens: int  # that went through the decoder
    target_tokens: int
    weight_sum: float
    seconds: float
    tokens_per_second: float  # tokens / seconds
    stats: Mapping[str, float]  # means per weight: accuracy, entropy, logprob, ...
    peak_memory: int

    def record(self) -> dict[str, Any]:
        """One flat object for metrics.jsonl."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "stats"}
        return {"kind": "train", **fields, **self.stats}


HeadLoss = Callable[..., LossOutput]
"""The loss head with its objective chosen: (hidden, weight, bias, *, source, target, target_weight,
transform).
"""
