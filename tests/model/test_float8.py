"""Linear maps that multiply in float8, against torchao's own, emulated; here everything is."""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tiny import tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import ModelError
from tunesmith.model.adapters.targets import candidates
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.kernels import float8
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.ops.numerics import Comparison, equivalence_trial
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

pytest.importorskip("torchao.float8")
attention.register()


@functools.cache
def torchaos() -> Any:
    """What torchao calls the same arithmetic; only its emulation runs on a CPU."""
    from torchao.float8 import Float8LinearConfig

    found = Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp")
    fields = {name: getattr(found, name) for name in found.__dataclass_fields__}
    return Float8LinearConfig(**{**fields, "emulate": True})


def by_torchao(model: nn.Module, names: list[str] | None = None) -> nn.Module:
    from torchao.float8 import convert_to_float8_training

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert_to_float8_training(
            model, config=torchaos(), module_filter_fn=lambda _, n: names is None or n in names
        )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_map_is_torchaos_to_the_bit(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(1)
    ours = nn.Linear(96, 48, bias=bias, dtype=dtype)
    theirs = by_torchao(nn.Sequential(copy.deepcopy(ours)))
    assert float8.use_float8(nn.Sequential(ours), ["0"]) == (["0"], [])
    given = torch.randn(1, 53, 96, dtype=dtype) * torch.logspace(-3, 3, 53, dtype=dtype)[:, None]
    grad = torch.randn(1, 53, 48, dtype=dtype)
    found: list[list[Tensor]] = []
    for model in (ours, theirs):
        inputs = [given.clone().requires_grad_(), *model.parameters()]
        output = model(inputs[0])
        found.append([output, *torch.autograd.grad(output, inputs, grad)])
    assert found[0][0].shape == (1, 53, 48)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    plain = nn.functional.linear(given, ours.weight, ours.bias)
    apart = float((found[0][0] - plain).detach().norm() / plain.detach().norm())
    assert 1e-3 < apart < 0.1  # it is float8


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(2)
    module = nn.Linear(64, 32)
    float8.use_float8(nn.Sequential(module), ["0"])
    rows, grad = torch.randn(7, 64), torch.randn(7, 32)
    rows[3] *= 1000
    grad[3] *= 1000

    def outputs(some: slice) -> list[Tensor]:
        inputs = rows[some].clone().requires_grad_()
        output = module(inputs)
        return [output, *torch.autograd.grad(output, [inputs], grad[some])]

    whole = outputs(slice(None))
    for row in range(7):
        for one, all_ in zip(outputs(slice(row, row + 1)), whole, strict=True):
            torch.testing.assert_close(one[0], all_[row], rtol=1e-6, atol=1e-6)


def test_a_frozen_weight_gets_no_gradient_and_keeps_no_input() -> None:
    module = nn.Linear(32, 16).requires_grad_(False)
    float8.use_float8(nn.Sequential(module), ["0"])
    given = torch.randn(5, 32, requires_grad=True)
    output = module(given)
    kept = [t for t in output.grad_fn.saved_tensors if t is not None]
    assert [tuple(t.shape) for t in kept] == [(16, 32)]
    output.sum().backward()
    assert given.grad is not None
    assert module.weight.grad is None


def test_zeros_and_rows_of_extreme_sizes_stay_finite() -> None:
    rows = torch.zeros(4, 16)
    rows[1], rows[2], rows[3] = 3e38, 1e-38, torch.linspace(-1, 1, 16)
    values, factor = float8.to_float8(rows)
    back = values.float() * factor
    assert bool(back.isfinite().all())
    assert torch.equal(back[0], rows[0])
    torch.testing.assert_close(back[1], rows[1], rtol=0.07, atol=0)
    torch.testing.assert_close(back[3], rows[3], rtol=0.07, atol=1e-3)
    assert torch.equal(factor.log2(), factor.log2().round())


def test_evaluation_multiplies_plainly_and_names_stay() -> None:
    module, given = nn.Linear(32, 16), torch.randn(5, 32)
    model = nn.Sequential(module, nn.Linear(16, 10), nn.Linear(10, 16))
    names, plain = list(model.state_dict()), module(given)
    weight = module.weight
    done, left = float8.use_float8(model, ["0", "1", "2"])
    assert (done, left) == (["0"], ["1", "2"])  # 16 does not divide 10
    assert module.weight is weight
    assert list(model.state_dict()) == names
    assert not torch.equal(module(given), plain)
    model.eval()
    assert torch.equal(module(given), plain)
    model.train()
    float8.SWAP.restore(model)
    assert type(module) is nn.Linear
    assert torch.equal(module(given), plain)


def test_a_device_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"capability 8\.9") as caught:
        float8.check_device(torch.device("cpu"))
    assert caught.value.exit_code == 2
    assert caught.value.hint == "model.float8=none"
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ModelError, match=r"capability 8\.6"):
        float8.check_device(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(ModelError, match="doesn't work"):  # there is no GPU here
        float8.check_device(gpu)
    ones = torch.ones(4)
    half = [Comparison(1.5 * ones, ones, float8.ROUNDING)]
    monkeypatch.setattr(float8, "_compared_products", lambda _: half)
    with pytest.raises(ModelError, match=r"differs by 5\.0e\+01 times what rounding"):
        float8.check_device(gpu)
    near = [Comparison(1.001 * ones, ones, float8.ROUNDING)]
    monkeypatch.setattr(float8, "_compared_products", lambda _: near)
    float8.check_device(gpu)


def test_the_trial_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert equivalence_trial(lambda: float8._compared_products(cpu)).excess == 0
    casts = equivalence_trial(lambda: float8._compared_casts(float8.to_float8, cpu))
    assert casts.excesses
    assert casts.excess == 0

    def whole_only(values: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        return float8.to_float8(values, True)

    assert equivalence_trial(lambda: float8._compared_casts(whole_only, cpu)).excess > 1


def rows() -> list[Document]:
    """Two that share a beginning, one that branches, one by itself."""

    def segment(ids: Any, parent: int, start: int, index: list[int]) -> Segment:
        weight = np.linspace(0.5, 1.5, len(index), dtype=np.float32)
        return Segment(np.asarray(ids, np.int32), parent, start, np.array(index, np.int32), weight,
                       np.zeros(len(index), np.int32))  # fmt: skip

    made = [
        (segment(range(5, 25), -1, 0, [9, 12, 19]),),
        (segment([*range(5, 15), *range(40, 50)], -1, 0, [12, 19]),),
        (segment(range(60, 72), -1, 0, [5]), segment(range(80, 86), 0, 12, [0, 5]),
         segment(range(90, 97), 0, 12, [3, 6])),
        (segment(range(100, 109), -1, 0, [2, 8]),),
    ]  # fmt: skip
    return [Document(segments, Origin("made", n)) for n, segments in enumerate(made)]


def paths(document: Document) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Ids from the root, places of the targets in them and their weights, for each segment."""
    found = []
    for one in document.segments:
        above = [] if one.parent < 0 else [document.segments[one.parent].ids[: one.start]]
        found.append((np.concatenate([*above, one.ids]), one.start + one.index, one.weight))
    return found


def gradients(model: Any) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@dataclass(slots=True)
class Two:
    """A model of ours and plain transformers' with the same weights, multiplied by torchao."""

    ours: CausalLM
    plain: Any

    def losses(self, documents: list[Document], micro_tokens: int) -> tuple[float, float]:
        """Take the gradients of both; their losses."""
        found = total = 0.0
        for plan in plan_step(documents, micro_tokens=micro_tokens):
            output = self.ours(collate(plan), functools.partial(head_loss, objective=nll))
            output.loss_sum.backward()
            found += float(output.loss_sum.detach())
        for document in documents:
            for ids, index, weight in paths(document):
                tokens = torch.from_numpy(ids.astype(np.int64))
                logits = self.plain(input_ids=tokens[None]).logits[0]
                loss = nn.functional.cross_entropy(
                    logits[torch.from_numpy(index) - 1], tokens[index], reduction="none"
                )
                loss = (loss * torch.from_numpy(weight)).sum()
                loss.backward()
                total += float(loss.detach())
        return found, total

    @property
    def apart(self) -> float:
        """By how much of its norm a gradient differs, at most."""
        one, other = gradients(self.ours.model), gradients(self.plain)
        assert one.keys() == other.keys()
        return max(float((one[n] - other[n]).norm() / other[n].norm()) for n in one)


def two(*, adapted: bool = False, ours_too: bool = True) -> Two:
    plain = tiny_model("llama", num_hidden_layers=2)
    model = tiny_model("llama", num_hidden_layers=2, attention="tunesmith")
    causal_lm = CausalLM(model, logits=read_logit_transform(model.config), native_attention="eager")
    names = list(candidates(causal_lm).linear)
    if ours_too:
        assert float8.use_float8(model, names) == (names, [])
    by_torchao(plain, names)
    if adapted:
        causal_lm.model, plain = with_lora(model), with_lora(plain)
    causal_lm.train()
    plain.train()
    return Two(causal_lm, plain)


@pytest.mark.parametrize("micro_tokens", [1000, 25])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_step_is_torchaos_one_document_at_a_time(adapted: bool, micro_tokens: int) -> None:
    apart = [rows()[0], rows()[3]]
    assert len(plan_step(apart, micro_tokens=micro_tokens)) == (1 if micro_tokens > 100 else 2)
    pair = two(adapted=adapted)
    found, wanted = pair.losses(apart, micro_tokens)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert pair.apart < 1e-5
    assert any("lora_A" in name for name in gradients(pair.ours.model)) == adapted


def test_a_shared_prefix_is_rounded_once_on_its_way_back() -> None:
    pair, plainly = two(), two(ours_too=False)
    found, wanted = pair.losses(rows(), 1000)
    assert found == pytest.approx(wanted, rel=1e-6)  # forward each token is by itself
    plainly.losses(rows(), 1000)
    assert 1e-4 < pair.apart < plainly.apart / 3  # a part of what float8 rounds anyhow


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)
