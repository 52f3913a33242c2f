"""A CausalLM is what its constructor made: nobody else sets what it holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tunesmith
from tiny import tiny_folder, tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.model import causal_lm as module
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import load_causal_lm, wrap_causal_lm
from tunesmith.model.ops.activation_offload import offloaded
from tunesmith.model.source import resolve_model
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Batch, Document, Origin, Segment

ROOT = Path(tunesmith.__file__).parent
HELD = {"model", "before_head", "logits", "native_attention", "unpacked"}


def held(causal_lm: CausalLM) -> set[str]:
    """What it holds besides what every torch module does."""
    return {*vars(causal_lm), *causal_lm._modules} - set(vars(nn.Module()))


def test_it_holds_no_more_once_it_is_loaded_and_adapted(tmp_path: Path) -> None:
    causal_lm = load_causal_lm(
        resolve_model(str(tiny_folder(tmp_path / "m"))), dtype="float32"
    ).model
    assert held(causal_lm) == HELD
    add_adapter(causal_lm, AdapterSpec(kind="pissa", rank=2))
    assert held(causal_lm) == HELD
    assert isinstance(causal_lm.before_head, nn.Identity)


def sets(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Attributes of other objects than `self` that are set, with their lines."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
        for target in targets:
            for part in ast.walk(target):
                own = isinstance(part, ast.Attribute) and getattr(part.value, "id", "") == "self"
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and not own:
                    yield part.attr, part.lineno


def test_nothing_sets_an_attribute_of_it_from_outside() -> None:
    """By name, in all of the project: `model` alone is the name of another object's part too."""
    found = {
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in ROOT.rglob("*.py")
        for name, line in sets(ast.parse(path.read_text()))
        if name in HELD
    }
    assert {entry.split(":")[0] for entry in found} == {"run/api.py"}, found  # the user's objects


def a_batch() -> Batch:
    ids = np.arange(5, 205, dtype=np.int32)
    index = np.arange(1, 200, dtype=np.int32)
    segment = Segment(ids, -1, 0, index, np.ones(199, np.float32), np.zeros(199, np.int32))
    (plan,) = plan_step([Document((segment,), Origin("x", 0))], micro_tokens=1000)
    return collate(plan, torch.device("cpu"))


@pytest.mark.parametrize("offload", [False, True])
def test_offload_is_asked_for_in_a_pass(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's activations are moved, those of the head not; gradients are the same."""
    model = wrap_causal_lm(tiny_model(num_hidden_layers=2)).model.train()
    moved: list[torch.Tensor] = []
    monkeypatch.setattr(module, "offloaded", lambda inner: offloaded(inner, copied=moved.append))

    def head(*inputs: torch.Tensor, **named: object):
        inside = len(moved)
        output = head_loss(*inputs, objective=nll, **named)  # pyright: ignore
        assert len(moved) == inside
        return output

    gradients = []
    for way in (False, offload):
        model.zero_grad()
        model(a_batch(), head, offload=way).loss_sum.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert bool(moved) == offload
    plain, found = gradients
    assert all(torch.equal(found[name], grad) for name, grad in plain.items())
