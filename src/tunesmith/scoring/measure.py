"""Per-target losses of documents, computed as evaluation does: packed, with shared prefixes."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.model.causal_lm import CausalLM
from tunesmith.objectives import Chunk, head_loss, nll
from tunesmith.train.evaluate import GROUP_TOKENS, document_groups
from tunesmith.train.microbatches import collate
from tunesmith.types import Document

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets of one document, in no particular order. Shapes: [k] each."""

    position: NDArray[np.int64]  # of the target on its path
    token: NDArray[np.int64]
    weight: Floats
    nll: Floats  # -log p(target), nats
    correct: Floats  # 1 where the target is the likeliest token, else 0
    entropy: Floats  # of the whole distribution, nats

    def mean(self, values: Floats) -> float:
        """The mean of `values` [k] per weight, as the training loss is one."""
        return float((self.weight * values).sum() / self.weight.sum())

    def without(self, places: frozenset[tuple[int, int]]) -> Targets:
        """Those that don't stand at one of `places`, given as (position, token)."""
        if not places:
            return self
        pairs = zip(self.position.tolist(), self.token.tolist(), strict=True)
        kept = np.array([pair not in places for pair in pairs], bool)
        return Targets(*(getattr(self, name)[kept] for name in self.__slots__))


@dataclass(slots=True)
class _Recorder:
    """The NLL, as an objective of the head that keeps what it sees of each target."""

    nll: list[Tensor] = field(default_factory=list[Tensor])
    correct: list[Tensor] = field(default_factory=list[Tensor])
    entropy: list[Tensor] = field(default_factory=list[Tensor])

    def __call__(self, chunk: Chunk) -> Tensor:
        # Sums over a vocabulary lose its many small terms in float32: 1e-5 of a loss, 2e-4 of an
        # entropy over 49,152 tokens.
        logp = torch.log_softmax(chunk.logits.detach(), -1, dtype=torch.float64)
        self.nll.append(-logp.gather(1, chunk.target[:, None]).squeeze(1))
        self.correct.append(chunk.argmax == chunk.target)
        self.entropy.append(torch.special.entr(logp.exp_()).sum(-1))
        return nll(chunk)

    def arrays(self) -> tuple[Floats, Floats, Floats]:
        """(nll, correct, entropy) of the micro-batch's targets, [N] each."""
        joined = (torch.cat(parts) for parts in (self.nll, self.correct, self.entropy))
        first, second, third = (part.to("cpu", torch.float64).numpy() for part in joined)
        return first, second, third


@torch.no_grad()
def measure_targets(
    model: CausalLM,
    documents: Sequence[Document],
    *,
    micro_tokens: int,
    device: torch.device | str = "cpu",
) -> Iterator[Targets]:
    """The targets of each document, in the documents' order. The model is to be in eval mode."""
    for _, group in document_groups(documents, micro_tokens * GROUP_TOKENS):
        found: list[list[Targets]] = [[] for _ in group]
        for plan in plan_step(group, micro_tokens=micro_tokens, unpacked=model.unpacked):
            recorder = _Recorder()
            model(collate(plan, device), functools.partial(head_loss, objective=recorder))
            for document, targets in _by_document(plan, recorder.arrays()):
                found[document].append(targets)
        for parts in found:
            names = Targets.__slots__
            yield Targets(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))


def _by_document(
    plan: MicrobatchPlan, measured: tuple[Floats, Floats, Floats]
) -> Iterator[tuple[int, Targets]]:
    """What each document asked for in a micro-batch."""
    owners = plan.owners
    order = np.argsort(owners.document, kind="stable")
    cuts = np.flatnonzero(np.diff(owners.document[order])) + 1
    for part in np.split(order, cuts):
        if not len(part):
            continue
        number = owners.target[part]
        yield (
            int(owners.document[part[0]]),
            Targets(
                plan.layout.position[plan.source[number]].astype(np.int64) + 1,
                plan.target[number].astype(np.int64),
                owners.weight[part].astype(np.float64),
                *(values[number] for values in measured),
            ),
        )
