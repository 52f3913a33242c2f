"""P2 and P3 for models with recurrent layers: loss and every gradient of a step do not depend on
how its documents share forward passes, nor on what is recomputed.

Oracle: plain transformers, one path at a time, labels made by hand.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from recurrent_models import ONE_OF_A_KIND, RECURRENT, edge_documents, paths, recurrent_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import ModelError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import wrap_causal_lm
from tunesmith.model.ops.activation_checkpointing import set_checkpointing
from tunesmith.model.recurrent import replace as recurrent
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document

TOLERANCE = 1e-5
PER_HEAD = 1e-4
"""For parameters with one value a head: terms of all tokens and channels that nearly cancel. Kimi
delta attention's A_log has 3e-5 where it has 4 values; no other parameter has above 6e-6.
"""
LAYOUTS = {
    "one": dict(micro_tokens=10**6),
    "cut": dict(micro_tokens=160),
    "path by path": dict(micro_tokens=1),
    "unshared": dict(micro_tokens=10**6, share_prefixes=False),
    "unshared, cut": dict(micro_tokens=200, share_prefixes=False),
}
MODES = ["layers", "selective", 2]
PROJECTIONS = {
    "qwen3_5_text": "linear_attn.in_proj_qkv",
    "kimi_linear": "self_attn.b_proj",
    "falcon_h1": "mamba.in_proj",
    "mamba": "mixer.x_proj",
    "lfm2": "conv.in_proj",
    "minimax": "self_attn.qkv_proj",
    "recurrent_gemma": "temporal_block.linear_x",
}
HEAD = functools.partial(head_loss, objective=nll, chunk_bytes=4 * 448 * 7)
Step = tuple[float, dict[str, Tensor | None]]


def total_weight(rows: list[Document]) -> float:
    return sum(float(s.weight.sum()) for row in rows for s in row.segments)


@functools.cache
def one_at_a_time(family: str) -> Step:
    """(loss, gradients) by the oracle."""
    model = recurrent_model(family).train()
    rows = edge_documents()
    total = total_weight(rows)
    loss = 0.0
    for row in rows:
        for ids, places, weight in paths(row):
            ids = torch.from_numpy(ids).long()
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits[places - 1], ids[places], reduction="none"
            )
            part = (losses * torch.from_numpy(weight)).sum() / total
            part.backward()
            loss += part.item()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def packed_model(family: str) -> CausalLM:
    model = wrap_causal_lm(recurrent_model(family)).model.train()
    assert recurrent.is_recurrent(model)
    assert not model.unpacked
    return model


def step(model: CausalLM, rows: list[Document], **layout) -> Step:
    total, loss = total_weight(rows), 0.0
    for plan in plan_step(rows, **layout):
        output = model(collate(plan), HEAD)
        (output.loss_sum / total).backward()
        loss += output.loss_sum.item() / total
    return loss, {name: p.grad for name, p in model.model.named_parameters()}


def assert_equal(found: Step, expected: Step) -> None:
    assert found[0] == pytest.approx(expected[0], rel=TOLERANCE)
    for name, gradient in expected[1].items():
        if gradient is None or gradient.norm() == 0:
            continue
        ours = found[1][name]
        assert ours is not None, name
        bound = TOLERANCE if gradient.numel() > 8 else PER_HEAD
        assert (ours - gradient).norm() <= bound * gradient.norm(), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_layouts_agree_with_one_document_at_a_time(family: str, layout: str) -> None:
    assert_equal(
        step(packed_model(family), edge_documents(), **LAYOUTS[layout]), one_at_a_time(family)
    )


@pytest.mark.parametrize("family", sorted(set(RECURRENT) - set(ONE_OF_A_KIND)))
def test_other_families_of_each_kind_agree(family: str) -> None:
    found = step(packed_model(family), edge_documents()[::-1], micro_tokens=10**6)
    assert_equal(found, one_at_a_time(family))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_recomputed_layers_keep_documents_apart(family: str, mode: str | int) -> None:
    model = packed_model(family)
    set_checkpointing(model.base, mode)
    assert_equal(step(model, edge_documents(), micro_tokens=10**6), one_at_a_time(family))


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_gradients_are_the_same_bits_each_time(family: str) -> None:
    torch.use_deterministic_algorithms(True)
    first, again = (step(packed_model(family), edge_documents(), micro_tokens=160) for _ in "12")
    assert first[0] == again[0]
    for name, gradient in first[1].items():
        assert gradient is None or torch.equal(gradient, again[1][name]), name


@pytest.mark.parametrize("family", ONE_OF_A_KIND)
def test_the_comparison_notices_documents_that_see_each_other(family: str) -> None:
    model = packed_model(family)
    recurrent.restore(model)
    found = step(model, edge_documents(), micro_tokens=10**6)
    with pytest.raises(AssertionError):
        assert_equal(found, one_at_a_time(family))


def test_recomputation_without_the_layout_is_refused() -> None:
    """The model's own switch knows nothing of layouts: what it recomputes would mix documents."""
    model = packed_model("mamba")
    model.base.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ModelError, match="without its micro-batch's layout"):
        step(model, edge_documents(), micro_tokens=10**6)


@pytest.mark.parametrize("family", PROJECTIONS)
def test_adapters_on_the_mixers_projections(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    def with_lora():
        torch.manual_seed(1)
        model = recurrent_model(family)
        target = [PROJECTIONS[family]]
        config = LoraConfig(r=4, target_modules=target, init_lora_weights=False)
        return get_peft_model(model, config).train()

    plain, rows = with_lora(), edge_documents()
    total = total_weight(rows)
    for row in rows:
        for ids, places, weight in paths(row):
            ids = torch.from_numpy(ids).long()
            logits = plain(input_ids=ids[None], use_cache=False).logits[0]
            losses = torch.nn.functional.cross_entropy(
                logits[places - 1], ids[places], reduction="none"
            )
            ((losses * torch.from_numpy(weight)).sum() / total).backward()
    ours = wrap_causal_lm(with_lora()).model.train()
    assert recurrent.is_recurrent(ours)
    found = step(ours, rows, micro_tokens=10**6)[1]
    expected = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    assert expected
    for name, gradient in expected.items():
        assert gradient is not None, name
        assert found[name] is not None, name
        assert (found[name] - gradient).norm() <= TOLERANCE * gradient.norm(), name
