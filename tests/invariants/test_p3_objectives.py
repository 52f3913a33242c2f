"""P3 for every objective: loss and gradients of a step don't depend on layout, cut or order.

Oracle: plain transformers, one path at a time, with the objective's formula over all logits and,
for the routers, transformers' own load balancing loss of each path.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import formulas
from tiny import tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.moe_router import Routers
from tunesmith.objectives import named_objective, with_terms
from tunesmith.train.loss import ReferenceModel, RouterBalance, StepLoss
from tunesmith.train.old_policy import OldPolicy
from tunesmith.types import Document, Origin, Segment

attention.register()
TOLERANCE = 2e-5
OUTER = 3  # steps; the model of step 0 is the old policy of step 1
LAYOUTS = {
    "one": dict(micro_tokens=10**6),
    "cut": dict(micro_tokens=70),
    "path by path": dict(micro_tokens=1),
    "unshared": dict(micro_tokens=10**6, share_prefixes=False),
    "unpacked": dict(micro_tokens=1, unpacked=True),
}
OBJECTIVES: dict[str, tuple[Callable, Callable]] = {
    "nll": (named_objective("nll"), formulas.nll),
    "smoothed": (named_objective("nll", smoothing=0.1), formulas.smoothed),
    "dft": (named_objective("dft"), formulas.dft),
    "psft": (named_objective("psft"), formulas.psft),
    "eaft": (named_objective("eaft"), formulas.eaft),
    "asft": (with_terms(named_objective("asft"), kl=0.05), formulas.asft),
    "z-loss": (with_terms(named_objective("nll"), z_weight=0.01), formulas.with_z),
    "entropy": (with_terms(named_objective("nll"), entropy=0.1), formulas.with_entropy),
    "psft anchored": (
        with_terms(named_objective("psft", eps_low=0.1, eps_high=0.1), kl=0.3),
        formulas.psft_anchored,
    ),
}


def segment(ids, parent: int, start: int, index, weight=None) -> Segment:
    weight = np.ones(len(index)) if weight is None else weight
    return Segment(
        np.asarray(ids, np.int32), parent, start, np.array(index, np.int32),
        np.asarray(weight, np.float32), np.zeros(len(index), np.int32),
    )  # fmt: skip


def documents() -> list[Document]:
    """Weighted rows with a common prefix, one that branches, one whose path another goes on from,
    and a repeated one.
    """
    rng = np.random.default_rng(3)
    prefix = rng.integers(3, 400, 20)
    rows = []
    for i in range(4):
        body = rng.integers(3, 400, 8 + 5 * i)
        ids = np.concatenate([prefix, body]) if i % 2 else body
        rows.append((segment(ids, -1, 0, range(len(ids) - 5, len(ids)), rng.uniform(0.5, 2, 5)),))
    trunk = np.concatenate([prefix, rng.integers(3, 400, 4)])
    rows.append(
        (
            segment(trunk, -1, 0, [22, 23]),
            segment(rng.integers(3, 400, 5), 0, len(trunk), [0, 2, 4]),
            segment(rng.integers(3, 400, 9), 0, len(trunk), [0, 5, 8]),
        )
    )
    rows.append((segment(trunk, -1, 0, [21, 23]),))  # ends where the row above goes on
    rows.append(rows[1])
    return [Document(segments, Origin("made", i)) for i, segments in enumerate(rows)]


def paths(document: Document):
    """(ids from the root, places of the segment's targets in them, weights) of each segment with
    targets.
    """
    segments = document.segments
    for last in segments:
        chain = [last]
        while chain[-1].parent >= 0:
            chain.append(segments[chain[-1].parent])
        ids = np.concatenate([one.ids for one in reversed(chain)])
        if len(last.index):
            yield torch.tensor(ids).long(), last.start + last.index, torch.tensor(last.weight)


def whole_paths(document: Document) -> list[torch.Tensor]:
    """The ids that are run for the document, one list for each of its ends."""
    found = [(ids[: max(places)]) for ids, places, _ in paths(document)]
    inner = {tuple(a.tolist()[:n]) for a in found for n in range(len(a))}
    return [ids for ids in found if tuple(ids.tolist()) not in inner]


def moved(family: str, seed: int, **options):
    """The tiny model a little off its usual weights."""
    model = tiny_model(family, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


@functools.cache
def oracle(name: str):
    """(loss, gradients) of a step by the formula, one path at a time."""
    model, base, old = tiny_model("llama"), moved("llama", 1), moved("llama", 2)
    rows = documents()
    total = sum(float(s.weight.sum()) for d in rows for s in d.segments)
    loss = 0.0
    for ids, places, weight in (path for document in rows for path in paths(document)):
        logits = model(input_ids=ids[None]).logits[0][places - 1]
        with torch.no_grad():
            of_base = base(input_ids=ids[None]).logits[0][places - 1].log_softmax(-1)
            of_old = old(input_ids=ids[None]).logits[0][places - 1].log_softmax(-1)
        losses = OBJECTIVES[name][1](
            logits.log_softmax(-1), ids[places], logits=logits, log_q=of_base,
            old=of_old.gather(1, ids[places][:, None]).squeeze(1),
        )  # fmt: skip
        part = (losses * weight).sum() / total
        part.backward()
        loss += part.item()
    return loss, {n: p.grad for n, p in model.named_parameters()}


def wrapped(model) -> CausalLM:
    return CausalLM(model, logits=read_logit_transform(model.config), native_attention="eager")


def run(model: CausalLM, loss: StepLoss, rows: list[Document], old=None, **layout):
    """(loss, gradients) of the second step of an outer batch, as the trainer takes it."""
    if layout.get("unpacked"):
        model.run_unpacked()
    model.train()
    plans = plan_step(rows, **layout)
    cpu = torch.device("cpu")
    if old is not None:
        own = {name: value.clone() for name, value in model.state_dict().items()}
        model.model.load_state_dict(old.state_dict())
        loss.begin(model, 0, lambda step: (rows, plans), cpu)
        model.load_state_dict(own)
    loss.begin(model, 1, lambda step: (rows, plans), cpu)
    total = sum(float(plan.weight.sum()) for plan in plans)
    value = 0.0
    for plan in plans:
        output = loss(model, plan, cpu)
        (output.loss_sum / total).backward()
        value += output.loss_sum.item() / total
    return value, {name: p.grad for name, p in model.model.named_parameters()}


def assert_equal(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    for name, grad in expected[1].items():
        if grad is not None and grad.norm() > 0:
            assert (found[1][name] - grad).norm() <= TOLERANCE * grad.norm(), name


def one_step(name: str, rows: list[Document], **layout):
    needs_base = name in ("asft", "psft anchored")
    base = wrapped(moved("llama", 1, attention="tunesmith")).requires_grad_(False).eval()
    if layout.get("unpacked"):
        base.run_unpacked()
    loss = StepLoss(
        objective=OBJECTIVES[name][0],
        steps=10,
        reference=ReferenceModel(base) if needs_base else None,
        old_policy=OldPolicy(first=0, steps=OUTER) if "psft" in name else None,
    )
    old = moved("llama", 2) if "psft" in name else None
    return run(wrapped(tiny_model("llama", attention="tunesmith")), loss, rows, old, **layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_layouts_agree_with_one_path_at_a_time(name: str, layout: str) -> None:
    assert_equal(one_step(name, documents(), **LAYOUTS[layout]), oracle(name))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_order_of_documents_does_not_matter(name: str) -> None:
    assert_equal(one_step(name, documents()[::-1], micro_tokens=90), oracle(name))


ROUTER_WEIGHT = 0.3


def with_routers(family: str, rows: list[Document], **layout):
    model = wrapped(tiny_model(family, attention="tunesmith", **ROUTED.get(family, {})))
    balance = RouterBalance(Routers(model), ROUTER_WEIGHT)
    return run(model, StepLoss(named_objective("nll"), 10, balance=balance), rows, **layout)


ROUTED = {
    "qwen3_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
}


@functools.cache
def router_oracle(family: str):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = tiny_model(family, **ROUTED.get(family, {}))
    rows = documents()
    total = sum(float(s.weight.sum()) for d in rows for s in d.segments)
    loss = 0.0
    for ids, places, weight in (path for document in rows for path in paths(document)):
        logits = model(input_ids=ids[None]).logits[0][places - 1]
        losses = formulas.nll(logits.log_softmax(-1), ids[places])
        part = (losses * weight).sum() / total
        part.backward()
        loss += part.item()
    ways = [ids for document in rows for ids in whole_paths(document)]
    tokens = sum(len(ids) for ids in ways)
    for ids in ways:
        routed = model(input_ids=ids[None], output_router_logits=True)
        expected = load_balancing_loss_func(routed.router_logits, 4, 2)
        assert routed.aux_loss is None or torch.allclose(routed.aux_loss, expected)
        part = ROUTER_WEIGHT * expected * len(ids) / tokens
        part.backward()
        loss += part.item()
    return loss, {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_balance_of_routers_is_that_of_each_document_alone(family: str, layout: str) -> None:
    found = with_routers(family, documents(), **LAYOUTS[layout])
    assert_equal(found, router_oracle(family))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_balance_of_one_document_is_what_transformers_says(family: str) -> None:
    (document,) = documents()[3:4]
    model = tiny_model(family, **ROUTED.get(family, {}))
    (ids,) = whole_paths(document)
    expected = model(input_ids=ids[None], output_router_logits=True).aux_loss
    causal_lm = wrapped(tiny_model(family, attention="tunesmith", **ROUTED.get(family, {})))
    loss = StepLoss(
        named_objective("nll"), 10, balance=RouterBalance(Routers(causal_lm), ROUTER_WEIGHT)
    )
    (plan,) = plan_step([document], micro_tokens=10**6)
    loss.begin(causal_lm, 0, lambda step: ([document], [plan]), torch.device("cpu"))
    output = loss(causal_lm, plan, torch.device("cpu"))
    mean = output.stats["router_aux"].item() / output.weight_sum.item()
    assert mean == pytest.approx(expected.item(), rel=1e-5)


def test_checkpointing_gives_routers_the_same_gradients() -> None:
    rows = documents()
    model = wrapped(tiny_model("mixtral", attention="tunesmith"))
    model.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    balance = RouterBalance(Routers(model), ROUTER_WEIGHT)
    loss = StepLoss(named_objective("nll"), 10, balance=balance)
    assert_equal(run(model, loss, rows, micro_tokens=120), router_oracle("mixtral"))
