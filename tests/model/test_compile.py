"""Compiled layers against the same layers as they are: losses, gradients, sizes, copies, whole
runs. By torch's own interpreter of graphs where that is enough, by its compiler where marked slow.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_kernels import CPU, HEAD, assert_same, learned, wrapped
from torch import Tensor

import tunesmith
from gang import losses, records, weights
from recurrent_models import recurrent_model
from tiny import chat_inputs, four_steps
from tunesmith.build import compile as assembled
from tunesmith.build.microbatch_size import made_up_batch
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.read import read_recipe
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.errors import RecipeError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.compile import compile_layers, difference, restore_layers
from tunesmith.model.load import wrap_causal_lm
from tunesmith.model.ops.activation_checkpointing import set_checkpointing
from tunesmith.model.recurrent import replace as recurrent
from tunesmith.module_swap import RECORD
from tunesmith.train.microbatches import collate
from tunesmith.types import Document, Origin, Segment

QUICK = "eager"


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    logging.getLogger("torch.__trace").disabled = True  # pytest would keep a record of each guard
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def layers(model: CausalLM) -> list[Any]:
    return list(model.decoder.layers)


def adapted(family: str, dtype: torch.dtype) -> CausalLM:
    from peft import LoraConfig, get_peft_model

    model = wrapped(family, dtype)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
    model.replace_model(get_peft_model(model.model, config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def seeded(model: CausalLM) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(3)
    return learned(model)


def lengths(model: CausalLM, *counts: int) -> float:
    """The loss of documents of so many tokens in one micro-batch."""
    documents = []
    for count in counts:
        ids = np.random.default_rng(count).integers(5, 60, count).astype(np.int32)
        index = np.arange(1, count, dtype=np.int32)
        ones = np.ones(count - 1, np.float32)
        segment = Segment(ids, -1, 0, index, ones, np.zeros(count - 1, np.int32))
        documents.append(Document((segment,), Origin("x", 0)))
    (plan,) = plan_step(documents, micro_tokens=1000)
    model.zero_grad()
    loss = model(collate(plan, CPU), HEAD).loss_sum
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("family", ["llama", slow("gemma2"), slow("qwen3"), slow("gpt_oss")])
def test_losses_and_gradients(family: str) -> None:
    model = wrapped(family)
    expected = learned(model)
    compile_layers(layers(model), backend=QUICK)
    assert_same(model, expected, 2e-6)
    assert graphs() > 0


@pytest.mark.parametrize("family", ["lfm2", slow("qwen3_5_text"), slow("recurrent_gemma")])
def test_recurrent_mixers_follow_layouts_between_the_graphs(family: str) -> None:
    model = wrap_causal_lm(recurrent_model(family)).model.train()
    mixers = recurrent.SWAP.swapped(model)
    expected = lengths(model, 9, 40, 17)
    compile_layers(layers(model), backend=QUICK)
    assert difference(model, layers(model), made_up_batch(model, 127, CPU)) < 1e-2
    assert lengths(model, 9, 40, 17) == pytest.approx(expected, rel=1e-6)
    assert graphs() > 0
    restore_layers(model)
    assert recurrent.SWAP.swapped(model) == mixers
    assert lengths(model, 9, 40, 17) == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "layers", 2])
def test_recomputed_under_an_adapter_with_dropout(mode: str | int) -> None:
    model = adapted("llama", torch.float32)
    set_checkpointing(model.base, mode)
    loss, gradients = seeded(model)
    compile_layers(layers(model), backend=QUICK)
    found = seeded(model)
    assert found[0] == pytest.approx(loss, rel=1e-6)
    assert found[1].keys() == gradients.keys()
    for name, wanted in gradients.items():
        assert (found[1][name] - wanted).norm() < 1e-5 * wanted.norm(), name


def test_one_code_for_all_layers_and_sizes() -> None:
    model = wrapped("llama")
    sizes = [(33,), (64, 16), (7,), (96, 60, 5), (200,), (3,)]
    expected = [lengths(model, *counts) for counts in sizes]
    compile_layers(layers(model), backend=QUICK)
    assert difference(model, layers(model), made_up_batch(model, 127, CPU)) < 1e-2
    made = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [lengths(model, *counts) for counts in sizes]
        model.eval()
        with torch.no_grad():
            for tokens in (30, 64):
                model.hidden(made_up_batch(model, tokens, CPU))
    assert graphs() == made
    assert found == pytest.approx(expected, rel=1e-5)
    deeper = wrapped("llama")
    deeper.decoder.layers.extend(wrapped("llama").decoder.layers)
    compile_layers(layers(deeper), backend=QUICK)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    lengths(deeper, 33)
    assert graphs() == 4  # before, in and after attention's part, whatever the number of layers


def test_attention_is_left_out_and_what_it_compiles_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tunesmith.model.attention import dispatch as attention

    ran: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        def run(*inputs: Any) -> Any:
            ran.append(1)
            return graph(*inputs)

        return run

    own = torch.compile(lambda x: x + x, backend=backend)
    plain = attention.flash_tree_attention

    def inner(query: Tensor, *given: Any, **named: Any) -> Tensor:
        return plain(own(query) / 2, *given, **named)

    monkeypatch.setattr(attention, "flash_tree_attention", inner)
    model = wrapped("llama")
    compile_layers(layers(model), backend="eager")
    lengths(model, 20)
    assert len(ran) == 2


def broken(graph: Any, _: Any) -> Any:
    def run(*inputs: Any) -> Any:
        found = graph(*inputs)
        return [o * 1.01 if isinstance(o, Tensor) and o.is_floating_point() else o for o in found]

    return run


@pytest.mark.slow
def test_a_trial_finds_what_differs() -> None:
    model = wrapped("llama")
    batch = made_up_batch(model, 31, CPU)
    compile_layers(layers(model), backend="eager")
    assert difference(model, layers(model), batch) == 0
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all("forward" in vars(layer) for layer in layers(model))
    restore_layers(model)
    compile_layers(layers(model), backend=broken)  # type: ignore[arg-type]
    assert difference(model, layers(model), batch) > 1


def test_names_classes_and_copies_stay() -> None:
    model = wrapped("llama")
    before = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    compile_layers(layers(model), backend="eager")
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert list(model.state_dict()) == keys
    expected = learned(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.decoder.layers[0].parameters():
            parameter.zero_()
    assert_same(model, expected, 1e-12)
    assert learned(twin)[0] != expected[0]
    restore_layers(model)
    assert not any(RECORD in vars(m) or "forward" in vars(m) for m in model.modules())
    assert_same(model, expected, 1e-6)


RUNS = {
    "full": [],
    "recomputed": ["device.gradient_checkpointing=layers"],
    "held to its base": ["objective.kl=0.1"],
    "lora": ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.1"],
    "one path at a time": ["device.attention=unpacked"],
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return chat_inputs(tmp_path_factory.mktemp("compiled"), held_out=2)


def chosen(out: Path) -> dict[str, Any]:
    return json.loads((out / "machine.json").read_text())["chosen"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        assembled, "compile_layers", lambda made, **_: compile_layers(made, backend=QUICK)
    )


@pytest.mark.parametrize("kind", ["full", *map(slow, list(RUNS)[1:])])
@pytest.mark.usefixtures("quick")
def test_runs_learn_the_same(kind: str, given: dict[str, str], tmp_path: Path) -> None:
    plain = four_steps(given, tmp_path / "plain", *RUNS[kind])
    assert chosen(plain)["compile"] == "none"
    found = four_steps(given, tmp_path / "compiled", "device.compile=layers", *RUNS[kind])
    assert chosen(found)["compile"] == "2 layers, tried on 127 tokens"
    assert losses(found) == pytest.approx(losses(plain), rel=2e-5)
    held = [[record["nll"] for record in records(out, "eval")] for out in (plain, found)]
    assert held[1] == pytest.approx(held[0], rel=2e-5)
    assert weights(found).keys() == weights(plain).keys()


def test_layers_that_differ_stay_as_they_are(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrongly(made: Any, **_: Any) -> None:
        compile_layers(made, backend=broken)  # type: ignore[arg-type]

    def failing(made: Any, **_: Any) -> None:
        raise RuntimeError("no compiler\nhere")

    plain = four_steps(given, tmp_path / "plain")
    for number, (how, why) in enumerate(((wrongly, "they differ by"), (failing, "no compiler$"))):
        monkeypatch.setattr(assembled, "compile_layers", how)
        with pytest.warns(UserWarning, match=f"the layers are not compiled: {why}"):
            found = four_steps(given, tmp_path / str(number), "device.compile=layers")
        assert chosen(found)["compile"] == "none"
        assert losses(found) == losses(plain)


@pytest.mark.parametrize(("option", "where"), [
    ("device.kernels=liger", "device.kernels"),

    ("device.gradient_checkpointing=selective", "device.gradient_checkpointing"),
    ("device.shard=full", "device.shard"),
    ("device.tensor_parallel=2", "device.tensor_parallel"),
    ("device.activation_offload=true", "device.activation_offload"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(option: str, where: str) -> None:
    recipe = read_recipe({"model": "m", "data": "d"}, ["device.compile=layers", option])
    with pytest.raises(RecipeError, match="does not go with") as refused:
        check_together(recipe, Facts(world_size=2, local_size=2, device="cuda"))
    assert refused.value.where == where
    assert refused.value.hint is not None


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_compiler(family: str, dtype: torch.dtype) -> None:
    for model in (wrapped(family, dtype), adapted(family, dtype)):
        expected: dict[str, Any] = {}
        for mode in ("none", "layers"):
            set_checkpointing(model.base, mode)
            expected[mode] = seeded(model)
        torch._dynamo.reset()
        compile_layers(layers(model))
        apart = difference(model, layers(model), made_up_batch(model, 127, CPU))
        assert apart < (0.1 if dtype == torch.float32 else 1)
        for mode, (wanted_loss, wanted_gradients) in expected.items():
            set_checkpointing(model.base, mode)
            loss, gradients = seeded(model)
            bound = 1e-5 if dtype == torch.float32 else 4e-2
            assert loss == pytest.approx(wanted_loss, rel=bound)
            for name, wanted in wanted_gradients.items():
                gap = (gradients[name].float() - wanted.float()).norm()
                assert gap < 2 * bound * wanted.float().norm(), name


@pytest.mark.slow
def test_torchs_compiler_resumes_to_the_bit(given: dict[str, str], tmp_path: Path) -> None:
    options = ["device.compile=layers", "device.gradient_checkpointing=layers"]
    whole = four_steps(given, tmp_path / "whole", *options)
    assert chosen(whole)["compile"] == "2 layers, tried on 127 tokens"
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    shutil.rmtree(cut / "checkpoints" / "step-4")
    torch._dynamo.reset()
    tunesmith.resume(cut, progress=False)
    assert losses(cut) == losses(whole)
    one, two = weights(whole), weights(cut)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_layers_are_compiled_on_a_gpu(family: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    model = wrapped(family, dtype).to(device)
    compile_layers(layers(model))
    assert difference(model, layers(model), made_up_batch(model, 1021, device)) < 1
    made = graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (200, 512, 1000):
            model.hidden(made_up_batch(model, tokens, device)).sum().backward()
    assert graphs() == made
