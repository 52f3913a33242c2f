"""Every objective through the head, against plain float64 autograd written from its formula."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from formulas import (
    asft,
    dft,
    dft_smoothed,
    eaft,
    everything,
    kl,
    nll,
    psft,
    psft_anchored,
    smoothed,
    with_entropy,
    with_z,
)
from tunesmith.objectives import (
    ObjectiveInputs,
    ReferenceHidden,
    head_loss,
    named_objective,
    with_terms,
)
from tunesmith.types import LossOutput

T, D, V, N = 11, 16, 37, 9


class Made:
    """Inputs of the head in float64; `to` gives them in another precision."""

    def __init__(self, targets: int = N) -> None:
        generator = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.hidden, self.weight, self.bias = randn(T, D), randn(V, D), randn(V)
        self.base = ReferenceHidden(randn(T, D), randn(V, D), randn(V))
        self.source = torch.randint(0, T, (targets,), generator=generator)
        self.target = torch.randint(0, V, (targets,), generator=generator)
        self.target_weight = torch.rand(targets, generator=generator) + 0.1
        logits = self.hidden[self.source] @ self.weight.T + self.bias
        own = logits.log_softmax(-1).gather(1, self.target[:, None]).squeeze(1)
        # ratios on both sides of the clip
        self.old = own + 0.5 * randn(targets)


def softcap(logits: Tensor) -> Tensor:
    return 3.0 * torch.tanh(0.5 * logits / 3.0)


CASES: dict[str, tuple[Callable, Callable[..., Tensor]]] = {
    "nll": (named_objective("nll"), nll),
    "smoothed": (named_objective("nll", smoothing=0.1), smoothed),
    "dft": (named_objective("dft"), dft),
    "dft smoothed": (named_objective("dft", smoothing=0.1), dft_smoothed),
    "psft": (named_objective("psft"), psft),
    "eaft": (named_objective("eaft", alpha=1.0), eaft),
    "asft": (with_terms(named_objective("asft"), kl=0.05), asft),
    "z-loss": (with_terms(named_objective("nll"), z_weight=0.01), with_z),
    "entropy": (with_terms(named_objective("nll"), entropy=0.1), with_entropy),
    "all terms": (
        with_terms(named_objective("eaft", alpha=2.0), z_weight=0.01, entropy=0.1, kl=0.3),
        everything,
    ),
    "psft anchored": (
        with_terms(named_objective("psft", eps_low=0.1, eps_high=0.1), kl=0.3),
        psft_anchored,
    ),
}


def oracle(made: Made, formula: Callable[..., Tensor], transform):
    """(losses, gradients of hidden, weight and bias) by autograd on all logits in float64."""
    leaves = [x.clone().requires_grad_() for x in (made.hidden, made.weight, made.bias)]
    logits = leaves[0][made.source] @ leaves[1].T + leaves[2]
    base = made.base.hidden[made.source] @ made.base.weight.T + made.base.bias
    if transform is not None:
        logits, base = transform(logits), transform(base)
    losses = formula(
        logits.log_softmax(-1), made.target, logits=logits, old=made.old,
        log_q=base.log_softmax(-1),
    )  # fmt: skip
    total = (losses * made.target_weight).sum()
    return losses.detach(), torch.autograd.grad(total, leaves)


def run(made: Made, objective, transform, dtype: torch.dtype, rows: float = 4):
    leaves = [x.to(dtype).requires_grad_() for x in (made.hidden, made.weight, made.bias)]
    base = ReferenceHidden(*(x.to(dtype) for x in made.base))
    output: LossOutput = head_loss(
        *leaves, source=made.source, target=made.target, target_weight=made.target_weight,
        objective=objective, transform=transform, chunk_bytes=int(4 * V * rows),
        inputs=ObjectiveInputs(progress=0.3, old_logprob=made.old.to(dtype), reference=base),
    )  # fmt: skip
    (output.loss_sum / 2).backward()
    return output, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
@pytest.mark.parametrize("transform", [None, softcap])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, transform, dtype, tolerance: float) -> None:
    made = Made()
    objective, formula = CASES[case]
    losses, grads = oracle(made, formula, transform)
    output, found = run(made, objective, transform, dtype)
    expected = float((losses * made.target_weight).sum())
    assert output.loss_sum.item() == pytest.approx(expected, rel=tolerance)
    assert torch.allclose(output.token_loss.double(), losses, rtol=tolerance, atol=tolerance)
    for grad, wanted in zip(found, grads, strict=True):
        assert wanted.norm() > 0
        assert (grad.double() - wanted / 2).norm() <= tolerance * (wanted / 2).norm()


@pytest.mark.parametrize("case", CASES)
def test_one_target_gives_what_it_gives_among_others(case: str) -> None:
    made = Made(targets=1)
    objective, formula = CASES[case]
    losses, grads = oracle(made, formula, None)
    output, found = run(made, objective, None, torch.float64)
    assert torch.allclose(output.token_loss, losses, rtol=1e-6)
    for grad, wanted in zip(found, grads, strict=True):
        assert torch.allclose(grad, wanted / 2, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_weights_of_zero_give_a_finite_zero_and_a_connected_graph(case: str) -> None:
    made = Made()
    made.target_weight = torch.zeros(N)
    output, found = run(made, CASES[case][0], softcap, torch.float32)
    assert output.loss_sum.item() == 0
    for grad in found:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("case", CASES)
def test_chunks_do_not_change_the_result(case: str) -> None:
    made = Made()
    sizes = (1, 2, 2.7, 4, 100)  # some leave a rest of the targets, one a rest of its own bytes
    outputs = [run(made, CASES[case][0], None, torch.float64, rows) for rows in sizes]
    first, grads = outputs[0]
    for output, found in outputs[1:]:
        assert torch.allclose(output.token_loss, first.token_loss, rtol=1e-12)
        assert output.stats.keys() == first.stats.keys()
        for name in first.stats:
            assert output.stats[name].item() == pytest.approx(first.stats[name].item(), rel=1e-9)
        assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(found, grads, strict=True))


def test_no_chunk_mixes_targets_or_uses_more_than_it_should() -> None:
    made = Made(targets=0)
    output, found = run(made, CASES["all terms"][0], None, torch.float32)
    assert output.loss_sum.item() == 0
    assert all(not grad.any() for grad in found)
    assert {"accuracy", "entropy", "logprob"} <= output.stats.keys()


def test_statistics_are_what_their_names_say() -> None:
    made = Made()
    logits = made.hidden[made.source] @ made.weight.T + made.bias
    log_p = logits.log_softmax(-1)
    own = -nll(log_p, made.target)
    ratio = (own - made.old).exp()
    w = made.target_weight
    output, _ = run(made, CASES["psft anchored"][0], None, torch.float64)
    log_q = (made.base.hidden[made.source] @ made.base.weight.T + made.base.bias).log_softmax(-1)
    expected = {
        "accuracy": (log_p.argmax(-1) == made.target).double(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "logprob": own,
        "clipped": (ratio > 1.1).double(),
        "fallen": (ratio < 0.9).double(),
        "kl": kl(log_p, log_q),
    }
    assert output.stats.keys() == expected.keys()
    assert 0 < expected["clipped"].sum() < N > expected["fallen"].sum() > 0
    for name, values in expected.items():
        assert output.stats[name].item() == pytest.approx(float((w * values).sum()), rel=1e-6), name
    kept = ratio <= 1.1
    assert torch.allclose(
        output.log_effective_weight.exp(), torch.where(kept, ratio, 0.0) / own.exp()
    )


@pytest.mark.parametrize(
    ("case", "weight"),
    [("dft", lambda p, h: p), ("eaft", lambda p, h: h)],
)
def test_mean_weight(case: str, weight) -> None:
    made = Made()
    log_p = (made.hidden[made.source] @ made.weight.T + made.bias).log_softmax(-1)
    own = -nll(log_p, made.target)
    factor = eaft(log_p, made.target) / -own
    output, _ = run(made, CASES[case][0], None, torch.float64)
    expected = (made.target_weight * weight(own.exp(), factor)).sum()
    assert output.stats["mean_weight"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("case", "strength"),
    [
        ("nll", lambda log_p, y: torch.ones(len(y))),
        ("smoothed", lambda log_p, y: torch.ones(len(y))),
        ("z-loss", lambda log_p, y: torch.ones(len(y))),
        ("dft", lambda log_p, y: (-nll(log_p, y)).exp()),
        ("asft", lambda log_p, y: (-nll(log_p, y)).exp()),
        ("eaft", lambda log_p, y: eaft(log_p, y) / nll(log_p, y)),
    ],
)
def test_effective_weights_are_the_factor_over_the_probability(case: str, strength) -> None:
    made = Made()
    log_p = (made.hidden[made.source] @ made.weight.T + made.bias).log_softmax(-1)
    output, _ = run(made, CASES[case][0], None, torch.float64)
    expected = strength(log_p, made.target) / (-nll(log_p, made.target)).exp()
    torch.testing.assert_close(
        output.log_effective_weight.exp(), expected.double(), rtol=1e-6, atol=0
    )


def test_psft_starts_with_the_gradient_of_nll() -> None:
    made = Made()
    logits = made.hidden[made.source] @ made.weight.T + made.bias
    made.old = -nll(logits.log_softmax(-1), made.target)
    first, found = run(made, CASES["psft"][0], None, torch.float64)
    _, wanted = run(made, CASES["nll"][0], None, torch.float64)
    for grad, expected in zip(found, wanted, strict=True):
        assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-12)
    assert first.stats["clipped"].item() == 0


def test_an_anchor_to_oneself_pulls_nowhere() -> None:
    made = Made()
    made.base = ReferenceHidden(made.hidden, made.weight, made.bias)
    output, found = run(made, with_terms(lambda c: c.logprob * 0, kl=1.0), None, torch.float64)
    assert abs(output.loss_sum.item()) < 1e-9
    assert all(grad.norm() < 1e-9 for grad in found)


def test_large_logits_stay_finite() -> None:
    made = Made()
    made.hidden = made.hidden * 300
    for objective, _ in CASES.values():
        output, found = run(made, objective, None, torch.float32)
        assert math.isfinite(output.loss_sum.item())
        assert all(bool(grad.isfinite().all()) for grad in found)
