"""The head against plain autograd on whole logits in float64."""

from __future__ import annotations

import pytest
import torch

from tunesmith.objectives import head_loss, nll

T, D, V, N = 11, 16, 37, 9


def made(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    hidden, weight, bias = randn(T, D), randn(V, D), randn(V)
    source = torch.tensor([0, 3, 3, 10, 7, 1, 3, 9, 9])
    target = torch.randint(0, V, (N,), generator=generator)
    target_weight = torch.rand(N, generator=generator) + 0.1
    return hidden, weight, bias, source, target, target_weight


def softcap(logits: torch.Tensor) -> torch.Tensor:
    return 3.0 * torch.tanh(0.5 * logits / 3.0)


def reference(hidden, weight, bias, source, target, target_weight, transform):
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    logits = leaves[0][source] @ leaves[1].T + leaves[2]
    if transform is not None:
        logits = transform(logits)
    log_p = logits.log_softmax(-1)
    loss = (-log_p[torch.arange(N), target] * target_weight.double()).sum()
    entropy = -(log_p.exp() * log_p).sum(-1)
    return loss, torch.autograd.grad(loss, leaves), (entropy * target_weight).sum()


@pytest.mark.parametrize("transform", [None, softcap])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_loss_and_gradients_equal_those_of_whole_logits(transform, rows: int) -> None:
    inputs = made(torch.float32)
    hidden, weight, bias, source, target, target_weight = inputs
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    output = head_loss(
        *leaves, source=source, target=target, target_weight=target_weight, objective=nll,
        transform=transform, chunk_bytes=4 * V * rows,
    )  # fmt: skip
    (output.loss_sum / 2).backward()
    loss, grads, entropy = reference(*inputs, transform)
    assert output.loss_sum.item() == pytest.approx(loss.item(), rel=1e-5)
    assert output.weight_sum.item() == pytest.approx(target_weight.sum().item())
    for leaf, grad in zip(leaves, grads, strict=True):
        assert (leaf.grad - grad / 2).norm() <= 1e-5 * (grad / 2).norm()
    assert output.stats["entropy"].item() == pytest.approx(entropy.item(), rel=1e-4)
    assert output.stats["logprob"].item() == pytest.approx(-loss.item(), rel=1e-4)


def test_token_loss_is_unweighted_and_accuracy_is_weighted() -> None:
    hidden, weight, bias, source, _, target_weight = made(torch.float32)
    best = (hidden[source] @ weight.T + bias).argmax(-1)
    output = head_loss(
        hidden, weight, bias, source=source, target=best, target_weight=target_weight, objective=nll
    )
    expected = torch.nn.functional.cross_entropy(
        hidden[source] @ weight.T + bias, best, reduction="none"
    )
    assert torch.allclose(output.token_loss, expected, rtol=1e-5)
    assert output.stats["accuracy"].item() == pytest.approx(target_weight.sum().item())


def test_weights_of_zero_give_a_finite_zero_and_a_connected_graph() -> None:
    hidden, weight, bias, source, target, _ = made(torch.float32)
    hidden.requires_grad_()
    output = head_loss(
        hidden, weight, bias, source=source, target=target,
        target_weight=torch.zeros(N), objective=nll,
    )  # fmt: skip
    output.loss_sum.backward()
    assert output.loss_sum.item() == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


def test_no_gradient_of_a_frozen_weight_is_made() -> None:
    hidden, weight, _, source, target, target_weight = made(torch.float32)
    hidden.requires_grad_()
    output = head_loss(
        hidden, weight, None, source=source, target=target,
        target_weight=target_weight, objective=nll,
    )  # fmt: skip
    output.loss_sum.backward()
    assert weight.grad is None
    assert hidden.grad.norm() > 0


def test_the_largest_tensor_is_a_chunk_and_not_all_logits() -> None:
    """Largest allocation of the forward pass, by torch's own dispatch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    targets, vocabulary, rows = 4000, 5000, 50
    hidden = torch.randn(targets, 4, requires_grad=True)
    weight = torch.randn(vocabulary, 4, requires_grad=True)
    with Largest() as largest:
        head_loss(
            hidden, weight, None, source=torch.arange(targets),
            target=torch.zeros(targets, dtype=torch.long), target_weight=torch.ones(targets),
            objective=nll, chunk_bytes=4 * vocabulary * rows,
        )  # fmt: skip
    assert largest.numel == rows * vocabulary


def test_repeated_sources_give_the_same_bits_each_time() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 64, generator=generator)
    weight = torch.randn(300, 64, generator=generator)
    source = torch.randint(0, 3, (2000,), generator=generator)
    target = torch.randint(0, 300, (2000,), generator=generator)

    def gradient() -> torch.Tensor:
        leaf = hidden.clone().requires_grad_()
        head_loss(
            leaf, weight, None, source=source, target=target,
            target_weight=torch.ones(2000), objective=nll,
        ).loss_sum.backward()  # fmt: skip
        return leaf.grad

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(10))


def test_without_gradients_none_are_computed():
    seen: list[bool] = []

    def watching(chunk):
        seen.append(chunk.logits.requires_grad)
        return -chunk.logprob

    weight = torch.randn(11, 4, requires_grad=True)
    places = torch.arange(3)
    with torch.no_grad():
        head_loss(
            torch.randn(5, 4), weight, torch.zeros(11, requires_grad=True), source=places,
            target=places, target_weight=torch.ones(3), objective=watching,
        )  # fmt: skip
    assert seen == [False]
