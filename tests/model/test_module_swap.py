"""Patched modules are the same as before, once what was changed is restored."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tunesmith
from tiny import tiny_model
from tunesmith.build.tensor_parallel import tp_plan_of
from tunesmith.distributed import tensor_parallel
from tunesmith.distributed.tensor_parallel_ops import TensorParallel
from tunesmith.distributed.world import World
from tunesmith.model import compile as compiled
from tunesmith.model.adapters import fused_lora
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.kernels import Provider, float8, replace, use_kernels
from tunesmith.model.lm_head import LogitTransform
from tunesmith.model.ops import bf16_upcast
from tunesmith.module_swap import RECORD, ModuleSwap, restore_all, without_forwards

ROOT = Path(tunesmith.__file__).parent


def wrapped(dtype: torch.dtype = torch.float32) -> CausalLM:
    model = tiny_model("llama", num_hidden_layers=2)
    return CausalLM(model.to(dtype), logits=LogitTransform())


def looks(root: nn.Module) -> dict[str, Any]:
    """All that a swap could change, of each module: its class, and what its instance holds."""
    return {
        name: (type(module), sorted(vars(module)), vars(module).get("forward"))
        for name, module in root.named_modules()
    }


@dataclass(frozen=True)
class User:
    """A part of the project that patches modules."""

    swap: ModuleSwap
    model: Callable[[], nn.Module]
    apply: Callable[[Any], object]
    least: int  # so many modules are changed


def lora_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model: Any = tiny_model("llama", num_hidden_layers=2)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))  # pyright: ignore


def plain_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = hidden.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))


def fused(model: CausalLM) -> object:
    kernels = Provider(
        "Plain 1",
        lambda hidden, weight, eps, *_: plain_norm(hidden, weight, eps),
        {"silu": lambda gate, up: nn.functional.silu(gate) * up},
    )
    return use_kernels(model.decoder, kernels, dtype=torch.float32, device=torch.device("cpu"))


def sharded(model: CausalLM) -> object:
    tp = TensorParallel(2, 0)
    return tensor_parallel.apply_tensor_parallel(tp_plan_of(model, World(0, 2, 0, 2, tp=tp)), tp)


def quantized(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        if kind == "bitsandbytes":
            modules = pytest.importorskip("bitsandbytes").nn
            return nn.Sequential(modules.Linear4bit(32, 32), modules.Linear8bitLt(32, 32))
        quantization = pytest.importorskip("torchao.quantization")
        model = nn.Sequential(nn.Linear(32, 32)).requires_grad_(False)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        return model

    return make


def library(name: str) -> Any:
    from tunesmith.model.quantization import bnb, torchao

    return {"bitsandbytes": bnb, "torchao": torchao}[name]


def linear_names(model: CausalLM) -> list[str]:
    return [n for n, m in model.base.named_modules() if isinstance(m, nn.Linear) and "lm" not in n]


USERS = {
    "compile": User(
        compiled.SWAP,
        wrapped,
        lambda m: compiled.compile_layers(list(m.decoder.layers), backend="eager"),
        2,
    ),
    "kernels": User(replace.SWAP, wrapped, fused, 7),
    "float8": User(float8.SWAP, wrapped, lambda m: float8.use_float8(m.base, linear_names(m)), 10),
    "upcast": User(
        bf16_upcast.SWAP,
        lambda: wrapped(torch.bfloat16),
        bf16_upcast.upcast_linear_layers,
        14,
    ),
    "fused lora": User(fused_lora.SWAP, lora_model, fused_lora.fuse_low_rank, 14),
    "tensor parallelism": User(tensor_parallel.SWAP, wrapped, sharded, 16),
    **{
        name: User(
            ModuleSwap(name),
            quantized(name),
            lambda m, name=name: library(name).multiply_dequantized(m),
            1,
        )
        for name in ("bitsandbytes", "torchao")
    },
}


@pytest.fixture(autouse=True)
def no_bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_upcast, "cpu_bfloat16", lambda: None)


@pytest.mark.parametrize("leave", ["restore", "restoring", "all"])
@pytest.mark.parametrize("name", USERS)
def test_a_restored_model_is_as_before(name: str, leave: str) -> None:
    user = USERS[name]
    model = user.model()
    before, weights = looks(model), list(model.state_dict())
    with user.swap.restoring(model) if leave == "restoring" else nullcontext():
        user.apply(model)
        changed = user.swap.swapped(model)
        assert len(changed) >= user.least
        after = looks(model)
        assert sum(after[key] != before[key] for key in before) == len(changed)
        assert list(model.state_dict()) == weights
    if leave == "restore":
        user.swap.restore(model)
    if leave == "all":
        restore_all(model)
    assert looks(model) == before
    assert not user.swap.swapped(model)


@pytest.mark.parametrize("name", USERS)
def test_a_copy_is_restored_by_itself(name: str) -> None:
    user = USERS[name]
    model = user.model()
    user.apply(model)
    swapped = looks(model)
    twin = copy.deepcopy(model)
    user.swap.restore(twin)
    assert not any(RECORD in vars(module) for module in twin.modules())
    assert looks(model) == swapped


class Times(nn.Module):
    """Multiplies by 2."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Plus(Times):
    def forward(self, x: Tensor) -> Tensor:
        return x + 100


INNER, OUTER = ModuleSwap("inner"), ModuleSwap("outer")


def stacked() -> Times:
    module = Times()
    INNER.set_forward(module, lambda self, x: 10 * type(self).forward(self, x))
    below = module.forward
    OUTER.set_forward(module, lambda _, x: below(x) + 1)
    return module


@pytest.mark.parametrize("order", [(INNER, OUTER), (OUTER, INNER)], ids=["below", "top"])
def test_swaps_on_one_module_are_undone_in_any_order(order: tuple[ModuleSwap, ModuleSwap]) -> None:
    module = stacked()
    assert module(1) == 21
    order[0].restore(module)
    assert module(1) == (20 if order[0] is OUTER else 21)
    order[1].restore(module)
    assert module(1) == 2
    assert not {"forward", RECORD} & set(vars(module))


def test_classes_and_forwards_are_told_apart() -> None:
    module = stacked()
    INNER.set_class(module, Plus)
    assert module(1) == 10 * 101 + 1
    INNER.restore(module)
    assert type(module) is Times
    OUTER.restore(module)
    assert module(1) == 2


def test_an_error_inside_restores_too() -> None:
    module = Times()
    INNER.set_class(module, Plus)
    with pytest.raises(TypeError), INNER.restoring(module):
        module("no number")
    assert type(module) is Times


def test_forwards_are_back_after_a_pass_without_them() -> None:
    modules = [stacked(), Times()]
    with without_forwards(modules):
        assert [module(1) for module in modules] == [2, 2]
    assert [module(1) for module in modules] == [21, 2]
    restore_all(nn.ModuleList(modules))
    assert [module(1) for module in modules] == [2, 2]


def patches(tree: ast.AST) -> Iterator[int]:
    """Lines that set a `forward` or a `__class__` of something."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            if isinstance(target, ast.Attribute) and target.attr in ("forward", "__class__"):
                yield node.lineno


def test_nothing_else_patches_a_module() -> None:
    found = {
        str(path.relative_to(ROOT)): len(list(patches(ast.parse(path.read_text()))))
        for path in ROOT.rglob("*.py")
    }
    assert {path: count for path, count in found.items() if count} == {
        "__init__.py": 1,  # the class of the package, which is no torch module
        "distributed/fsdp.py": 1,  # takes back what torch's fully_shard made of a class
        "module_swap.py": 2,
    }
