"""The loss of a micro-batch: the model's forward pass, and what an objective needs besides it.

Everything an objective can need is here, each piece None or zero where it isn't asked for: the base
model's view (kl), the old policy (psft), noise on the embeddings, guesses read in place of targets,
and the routers' balance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.data.microbatch.planner import MicrobatchPlan
from tunesmith.distributed.model_parallel_group import ModelParallelGroup
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.moe_router import Routers, balance_loss
from tunesmith.model.neftune import EmbeddingNoise
from tunesmith.objectives import (
    Objective,
    ObjectiveInputs,
    ReferenceHidden,
    argmax_tokens,
    head_loss,
    nll,
)
from tunesmith.train.microbatches import collate, local_part
from tunesmith.train.old_policy import OldPolicy
from tunesmith.train.path_hash import path_ends, token_keys
from tunesmith.transfer import to_device
from tunesmith.types import Batch, Document, HeadLoss, Layout, LossOutput

PlanOf = Callable[[int], tuple[Sequence[Document], Sequence[MicrobatchPlan]]]
"""Documents and micro-batches of a step, counted from 0."""


@dataclass(slots=True)
class ReferenceModel:
    """The model as it was before training: a frozen copy, or the model without its adapter."""

    frozen: CausalLM | None

    def __call__(self, model: CausalLM, batch: Batch) -> ReferenceHidden:
        with torch.no_grad(), ExitStack() as stack:
            if self.frozen is None:
                stack.enter_context(eval_mode(model))
                stack.enter_context(model.model.disable_adapter())
            found = (self.frozen or model)(batch, _hidden_only)
        assert isinstance(found, ReferenceHidden)
        return found


@dataclass(slots=True)
class RouterBalance:
    """The balance loss of the documents' paths, averaged by token count over a step."""

    routers: Routers
    weight: float
    ends: list[dict[int, int]] = field(default_factory=list[dict[int, int]])
    scale: float = 0.0  # per token: its share of the step, times the step's weight of targets

    def begin(self, documents: Sequence[Document], plans: Sequence[MicrobatchPlan]) -> None:
        self.ends = [path_ends(document) for document in documents]
        tokens = sum(sum(ends.values()) for ends in self.ends)
        total = float(sum(plan.weight.sum(dtype=np.float64) for plan in plans))
        self.scale = total / max(tokens, 1)

    def __call__(self, plan: MicrobatchPlan, logits: Sequence[Tensor]) -> Tensor:
        """Sum over the paths that end in this micro-batch of tokens * balance, times `scale`."""
        ends = self._path_ends(plan)
        token = np.arange(len(plan.ids))
        member = (token <= ends[:, None]) & (ends[:, None] < plan.layout.visible_until)
        on = to_device(member, logits[0].device)
        each = balance_loss(logits, on, top_k=self.routers.top_k)
        return (each * on.sum(1)).sum() * self.scale

    def _path_ends(self, plan: MicrobatchPlan) -> NDArray[np.int64]:
        """The packed token that ends each path; one that ends several documents is there as
        often.
        """
        keys = token_keys(plan)
        pairs = np.unique(np.stack([plan.owners.document, plan.source[plan.owners.target]]), axis=1)
        found = [s for d, s in pairs.T.tolist() if int(keys[s]) in self.ends[d]]
        return np.asarray(found, np.int64)


@dataclass(slots=True)
class StepLoss:
    """The loss of each micro-batch of the step that was begun last."""

    objective: Objective
    steps: int  # of the whole run
    warmup: Objective = nll  # before the outer batches begin
    reference: ReferenceModel | None = None
    old_policy: OldPolicy | None = None
    sampling: float = 0.0  # probability of a guess at the last step
    noise: EmbeddingNoise | None = None
    balance: RouterBalance | None = None
    group: ModelParallelGroup = field(default_factory=ModelParallelGroup)  # of each micro-batch
    step: int = 0
    offload: bool = False  # the decoder's activations wait in the host's memory

    def begin(self, model: CausalLM, step: int, plan_of: PlanOf, device: torch.device) -> None:
        """Get ready for a step, counted from 0."""
        self.step = step
        if self.balance is not None:
            self.balance.begin(*plan_of(step))
        if self.old_policy is not None and self.old_policy.begins(step):
            last = min(step + self.old_policy.steps, self.steps)
            plans = [plan for number in range(step, last) for plan in plan_of(number)[1]]
            head = functools.partial(head_loss, objective=nll)
            with torch.no_grad(), eval_mode(model):
                found = [self._logprob(model, plan, head, device) for plan in plans]
            self.old_policy.take(plans, found)

    def __call__(self, model: CausalLM, plan: MicrobatchPlan, device: torch.device) -> LossOutput:
        """The loss of one micro-batch, differentiable."""
        old = None if self.old_policy is None else self._old_logprob(self.old_policy, plan, device)
        return self._loss(model, plan, device, old=old)

    def probe(
        self, model: CausalLM, document: Document, plan: MicrobatchPlan, device: torch.device
    ) -> LossOutput:
        """As much work as the loss of a micro-batch with this document, outside of any step."""
        if self.balance is not None:
            self.balance.begin([document], [plan])
        return self._loss(model, plan, device, old=None)

    def _loss(
        self, model: CausalLM, plan: MicrobatchPlan, device: torch.device, *, old: Tensor | None
    ) -> LossOutput:
        batch = collate(plan, device)
        if self.sampling:
            batch = self._with_guesses(model, batch, plan)
        sides = ObjectiveInputs(
            progress=self.step / self.steps,
            old_logprob=old,
            reference=None if self.reference is None else self.reference(model, batch),
        )
        warming = self.old_policy is not None and self.step < self.old_policy.first
        head = functools.partial(
            head_loss, objective=self.warmup if warming else self.objective, inputs=sides
        )
        with ExitStack() as stack:
            if self.noise is not None:
                lengths = path_lengths(plan.layout)[plan.layout.local]
                stack.enter_context(self.noise.over(to_device(lengths, device)))
            if self.balance is None:
                return model(batch, head, offload=self.offload)
            logits = stack.enter_context(self.balance.routers.recorded())
            output = model(batch, head, offload=self.offload)
        balance = self.balance(plan, logits)
        stats = {**output.stats, "router_aux": balance.detach()}
        loss_sum = output.loss_sum + self.balance.weight * balance
        return replace(output, loss_sum=loss_sum, stats=stats)

    @property
    def frozen(self) -> CausalLM | None:
        """The copy of the model as it was before training, if there is one."""
        return None if self.reference is None else self.reference.frozen

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {} if self.old_policy is None else self.old_policy.tensors()

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        if self.old_policy is not None:
            self.old_policy.restore(tensors)

    def close(self) -> None:
        """Leave the model as it was; nothing is asked for after this."""
        if self.noise is not None:
            self.noise.remove()
        if self.balance is not None:
            self.balance.routers.remove()

    def _logprob(
        self, model: CausalLM, plan: MicrobatchPlan, head: HeadLoss, device: torch.device
    ) -> Tensor:
        """Of each target of a whole micro-batch, [N], on every rank."""
        part = local_part(plan, self.group)
        found = -model(collate(part, device), head).token_loss
        if part.part is None:
            return found
        whole = found.new_zeros(len(plan.target))
        whole[to_device(part.part.targets.astype(np.int64), device)] = found
        return self.group.all_reduce(whole)

    def _old_logprob(
        self, policy: OldPolicy, plan: MicrobatchPlan, device: torch.device
    ) -> Tensor | None:
        if policy.empty or self.step < policy.first:
            return None
        return to_device(policy.find(plan), device)

    def _with_guesses(self, model: CausalLM, batch: Batch, plan: MicrobatchPlan) -> Batch:
        """The batch with some target tokens replaced, where they are read, by the likeliest token
        of a pass over the true ones (Mihaylova & Martins, arXiv 1906.07651).
        """
        probability = self.sampling * self.step / max(1, self.steps - 1)
        if probability == 0:
            return batch
        with torch.no_grad(), eval_mode(model):
            guesses = model(batch, argmax_tokens)
        assert isinstance(guesses, Tensor)
        after = plan.source + 1
        read = (after < plan.layout.visible_until[plan.source]) & (
            plan.ids[np.minimum(after, len(plan.ids) - 1)] == plan.target
        )
        taken = torch.rand(len(after)).numpy() < probability
        chosen = np.flatnonzero(read & taken)  # on the host: a mask's size would be asked for
        device = batch.input_ids.device
        places = to_device(after[chosen].astype(np.int64), device)
        ids = batch.input_ids.clone()
        ids[places] = guesses.index_select(0, to_device(chosen, device))
        return replace(batch, input_ids=ids)


@contextmanager
def eval_mode(model: CausalLM) -> Iterator[None]:
    """Without dropout, as in evaluation; the mode is restored on leaving."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def path_lengths(layout: Layout) -> NDArray[np.int64]:
    """Tokens of the longest path through each packed token, [T]."""
    if layout.flat:
        sizes = [chain.end - chain.start for chain in layout.chains]
        return np.repeat(np.asarray(sizes, np.int64), sizes)
    spans = np.empty(2 * len(layout.position), np.int64)
    spans[::2], spans[1::2] = np.arange(len(layout.position)), layout.visible_until
    padded = np.append(layout.position.astype(np.int64), 0)
    return np.maximum.reduceat(padded, spans)[::2] + 1


def _hidden_only(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, **_: object
) -> ReferenceHidden:
    return ReferenceHidden(hidden, weight, bias)
