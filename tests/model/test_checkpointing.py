"""Every mode of keeping activations gives the same gradients to the bit, in less memory."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from tiny import tiny_model
from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.errors import ModelError
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.memory.allocator import footprint
from tunesmith.model.ops.activation_checkpointing import as_mode, recomputing, set_checkpointing
from tunesmith.model.ops.activation_offload import offloaded
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

attention.register()
MODES = ["layers", "selective", 2]
FAMILIES = ["llama", "qwen3_moe", "gpt_oss", "gemma2"]
HEAD = functools.partial(head_loss, objective=nll)


def wrapped(family: str) -> CausalLM:
    torch.manual_seed(0)
    model = tiny_model(family, attention="tunesmith")
    return CausalLM(model, logits=read_logit_transform(model)).train()


def micro_batch(tokens: int = 512) -> MicrobatchPlan:
    ids = np.random.default_rng(0).integers(5, 60, tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    ones = np.ones(len(index), np.float32)
    segment = Segment(ids, -1, 0, index, ones, np.zeros(len(index), np.int32))
    (plan,) = plan_step([Document((segment,), Origin("x", 0))], micro_tokens=10**6)
    return plan


def gradients(model: CausalLM, plan: MicrobatchPlan) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(collate(plan, torch.device("cpu")), HEAD).loss_sum.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def kept(model: CausalLM, plan: MicrobatchPlan) -> int:
    """Bytes that wait for the backward pass."""
    batch = collate(plan, torch.device("cpu"))
    with footprint("cpu") as found:
        hidden = model.hidden(batch)
    assert hidden.requires_grad
    return found.held


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_the_same_to_the_bit(family: str, mode: str | int) -> None:
    torch.use_deterministic_algorithms(True)
    model, plan = wrapped(family), micro_batch(200)
    expected = gradients(model, plan)
    set_checkpointing(model.base, mode)
    found = gradients(model, plan)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.equal(gradient, found[name]), name


def test_each_mode_keeps_less_than_the_last() -> None:
    model, plan = wrapped("llama"), micro_batch()
    sizes: list[int] = []
    for mode in ("none", "selective", "layers"):
        set_checkpointing(model.base, mode)
        sizes.append(kept(model, plan))
    assert sizes[0] > 1.25 * sizes[1] > 1.25 * 1.25 * sizes[2] > 0


def test_every_second_layer_lies_between_all_and_none() -> None:
    model, plan = wrapped("llama"), micro_batch()
    sizes: list[int] = []
    for mode in ("none", 2, "layers"):
        assert set_checkpointing(model.base, mode) == recomputing(model)
        sizes.append(kept(model, plan))
    assert sizes[0] > sizes[1] > sizes[2]


def test_a_mode_can_be_left_again() -> None:
    model = wrapped("llama")
    layers = model.config.num_hidden_layers
    assert set_checkpointing(model.base, "selective") == layers
    assert set_checkpointing(model.base, layers) == recomputing(model) == 1
    assert set_checkpointing(model.base, "none") == recomputing(model) == 0


def test_true_false_and_one_are_modes() -> None:
    assert [as_mode(value) for value in (True, False, 1, 3, "selective")] == [
        "layers", "none", "layers", 3, "selective",
    ]  # fmt: skip


def test_an_architecture_without_such_layers_is_refused() -> None:
    bare = torch.nn.Linear(2, 2)
    assert set_checkpointing(bare, "none") == 0
    with pytest.raises(ModelError, match="can't recompute"):
        set_checkpointing(bare, "layers")


@pytest.mark.filterwarnings("error")
def test_the_embedding_is_not_asked_for_a_gradient() -> None:
    model = wrapped("llama")
    model.requires_grad_(False)
    set_checkpointing(model.base, "layers")
    set_checkpointing(model.base, "none")
    assert not model.hidden(collate(micro_batch(20), torch.device("cpu"))).requires_grad


@pytest.mark.parametrize("mode", ["none", "layers"])
def test_offloaded_activations_give_the_same_gradients(mode: str) -> None:
    model, plan = wrapped("llama"), micro_batch(600)
    set_checkpointing(model.base, mode)
    expected = gradients(model, plan)
    moved: list[torch.Tensor] = []
    batch = collate(plan, torch.device("cpu"))
    model.zero_grad()
    with offloaded(model, copied=moved.append):
        output = model(batch, HEAD)
    output.loss_sum.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert moved
    assert all(t.untyped_storage().data_ptr() not in weights for t in moved)


def test_footprint_counts_what_stays_and_what_was_there_in_between() -> None:
    with footprint("cpu") as found:
        big = torch.ones(2**20)
        del big
        small = torch.ones(2**18)
    assert small.numel() * 4 <= found.held < 2**20 + 2**16
    assert 2**22 <= found.peak < 2**22 + 2**20 + 2**16
