"""Ranks that hold the layers in parts learn what one process learns."""

from __future__ import annotations

import copy
import functools
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gang import assert_same_learning, losses, run_groups, weights
from recurrent_models import recurrent_model
from tiny import chat_rows, tiny_folder, tiny_model, write_jsonl
from tunesmith.build import tensor_parallel as assembled
from tunesmith.build.tensor_parallel import tp_plan_of
from tunesmith.checkpoint.folder import differences, load_checkpoint
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.read import read_recipe
from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.distributed.tensor_parallel import TPPlan, apply_tensor_parallel
from tunesmith.distributed.tensor_parallel_ops import TensorParallel
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError, RecipeError
from tunesmith.estimate import forecast
from tunesmith.model.adapters import AdapterSpec, add_adapter
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.load import wrap_causal_lm
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate, local_part
from tunesmith.train.path_hash import target_keys
from tunesmith.types import Document, Origin, Segment

# --- one micro-batch, the ranks as threads

FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "granite": {},
    "phi": {},
    "starcoder2": {"use_bias": True},
    "gemma2 with lora": {},
    "starcoder2 with lora": {"use_bias": True},
}


def whole_plan() -> MicrobatchPlan:
    """Branches at two depths, and a document by itself."""
    rows = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 20, 21], [1, 2, 50, 51, 52], [40, 41, 42, 43]]
    (plan,) = plan_step([document(row, n) for n, row in enumerate(rows)], micro_tokens=1000)
    return plan


def document(ids: list[int], number: int) -> Document:
    place = np.arange(1, len(ids), dtype=np.int32)
    weight = 0.5 + (np.asarray(ids[1:], np.float32) + number) % 3
    segment = Segment(np.asarray(ids, np.int32), -1, 0, place, weight, np.zeros_like(place))
    return Document((segment,), Origin("rows", number))


class Sums:
    """What ranks add up, between threads of one process."""

    def __init__(self, count: int) -> None:
        self.barrier = Barrier(count, timeout=30)
        self.boxes: list[Any] = [None] * count

    def of(self, place: int) -> Callable[[Tensor, Any], None]:
        def add(values: Tensor, op: Any) -> None:
            self.boxes[place] = values.clone()
            self.barrier.wait()
            terms = torch.stack(self.boxes)
            values.copy_(terms.amax(0) if op == torch.distributed.ReduceOp.MAX else terms.sum(0))
            self.barrier.wait()

        return add


def on_ranks(count: int, act: Callable[[World], Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What `act` returns on each of so many ranks."""
    plain = torch.distributed.ReduceOp.SUM
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda values, op=plain, group=None: group(values, op)
    )
    sums = Sums(count)
    found: list[Any] = [None] * count

    def run(place: int) -> None:
        try:
            found[place] = act(
                Played(place, count, tp=TensorParallel(count, place, sums.of(place)))
            )
        except BaseException as error:
            sums.barrier.abort()
            found[place] = error

    threads = [Thread(target=run, args=(place,)) for place in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in found if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, BrokenBarrierError)):
        raise error
    return found


@dataclass(frozen=True)
class Played(World):
    """Ranks that are threads; they can't make a mesh, and agree on sums alone."""

    def all_reduce_max(self, values: Sequence[float]) -> list[float]:
        return list(values)


def gradients_of(model: CausalLM, plan: MicrobatchPlan) -> tuple[float, dict[str, Tensor]]:
    model.train()
    head = functools.partial(head_loss, objective=nll)
    output = model(collate(plan, torch.device("cpu")), head)
    output.loss_sum.backward()
    return float(output.loss_sum.detach()), {n: p.grad for n, p in model.named_parameters()}


def divided(model: CausalLM, ranks: World) -> tuple[CausalLM, TPPlan]:
    """A copy of the model with this rank's part of its layers."""
    copied = copy.deepcopy(model)
    tp_plan = tp_plan_of(copied, ranks)
    apply_tensor_parallel(tp_plan, ranks.tp)
    return copied, tp_plan


@pytest.mark.parametrize("family", FAMILIES)
def test_every_gradient_is_that_of_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_causal_lm(
        tiny_model(family.split()[0], num_hidden_layers=2, **FAMILIES[family])
    ).model
    if family.endswith("lora"):
        add_adapter(model, AdapterSpec(rank=4))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.08)
    plan = whole_plan()
    loss, wanted = gradients_of(copy.deepcopy(model), plan)

    def run(ranks: World) -> tuple[float, dict[str, Tensor], dict[str, int | None], set[str]]:
        mine, tp_plan = divided(model, ranks)
        places, termed = tp_plan.shard_dims(mine), tp_plan.partial_grad_names(mine)
        return *gradients_of(mine, local_part(plan, ranks.tp)), places, termed

    ranks = on_ranks(2, run, monkeypatch)
    assert sum(rank[0] for rank in ranks) == pytest.approx(loss, rel=1e-5)
    _, _, places, termed = ranks[0]
    assert {name for name, place in places.items() if place is not None}
    for name, grad in wanted.items():
        if grad is None:
            continue
        parts = [rank[1][name] for rank in ranks]
        if places[name] is not None:
            found = torch.cat(parts, places[name])
        elif name in termed:
            found = parts[0] + parts[1]
        else:
            assert torch.equal(*parts), name
            found = parts[0]
        scale = float(grad.abs().max())
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=2e-6 * scale, msg=name)


def test_parts_have_every_target_once_and_count_tokens_once() -> None:
    plan = whole_plan()
    for count in (2, 3, 40):
        parts = [local_part(plan, TensorParallel(count, place)) for place in range(count)]
        assert sum(part.counted for part in parts) == plan.tokens
        assert all(part.tokens == plan.tokens for part in parts)
        for key in ("source", "target", "weight"):
            found = np.concatenate([getattr(part, key) for part in parts])
            assert found.tolist() == getattr(plan, key).tolist()
        assert sum(len(part.owners.weight) for part in parts) == len(plan.owners.weight)
        keys = np.concatenate([target_keys(part) for part in parts])
        assert keys.tolist() == target_keys(plan).tolist()


def test_ranks_of_a_copy_work_on_one_micro_batch_and_draw_alike() -> None:
    ranks = [World(n, 4, n, 4, tp=TensorParallel(2, n % 2)) for n in range(4)]
    assert [r.dp_size for r in ranks] == [2] * 4
    assert [r.dp_rank for r in ranks] == [0, 0, 1, 1]
    assert [r.rng_rank for r in ranks] == [0, 0, 1, 1]
    assert [World(n, 4, n, 4).rng_rank for n in range(4)] == [0, 1, 2, 3]


# --- what is refused


def check(ranks: World, *overrides: str) -> None:
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, list(overrides))
    check_together(recipe, Facts(ranks.size, ranks.local_size, "cpu"))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["device.context_parallel=2"], "device.context_parallel"),
        (["device.shard=full"], "device.shard"),
        (["adapter=dora"], "adapter.kind"),
        (["adapter=lora", "model.quantization=nf4"], "model.quantization"),
        (["optim=muon"], "optim.name"),
        (["optim=adamw_8bit"], "optim.name"),
        (["device.attention=unpacked"], "device.attention"),
        (["objective.scheduled_sampling=0.1"], "objective.scheduled_sampling"),
        (["eval.samples=2", "data.eval=2%"], "eval.samples"),
    ],
)
def test_what_needs_whole_layers_names_its_key(overrides: list[str], key: str) -> None:
    check(World(0, 2, 0, 2), *[o for o in overrides if "quantization" not in o])
    with pytest.raises(RecipeError) as caught:
        check(World(0, 2, 0, 2), "device.tensor_parallel=2", *overrides)
    assert caught.value.where == key
    assert "device.tensor_parallel=1" in (caught.value.hint or "")


def test_ranks_that_make_no_whole_copies() -> None:
    check(World(0, 6, 0, 6), "device.tensor_parallel=3")
    with pytest.raises(RecipeError, match="6 ranks can't be divided into groups of 4") as caught:
        check(World(0, 6, 0, 6), "device.tensor_parallel=4")
    assert caught.value.hint == "device.tensor_parallel=3, or a multiple of 4 ranks"
    with pytest.raises(RecipeError, match="nobody to divide the layers with"):
        check(World(), "device.tensor_parallel=2")


@pytest.mark.parametrize(
    ("family", "count", "said"),
    [
        ("gpt_oss", 2, "no plan that divides the layers of gpt_oss"),
        ("mixtral", 2, "only plain linear maps"),
        ("olmo2", 2, "colwise_gather_output"),
        ("llama", 4, "2 key heads can't be dealt to 4 ranks"),
        ("llama", 3, "4 attention heads can't be dealt to 3 ranks"),
    ],
)
def test_a_model_that_cannot_be_divided(family: str, count: int, said: str) -> None:
    model = wrap_causal_lm(tiny_model(family, num_hidden_layers=1)).model
    with pytest.raises(ModelError, match=said) as caught:
        tp_plan_of(model, World(0, count, 0, count, tp=TensorParallel(count, 0)))
    assert caught.value.where == "device.tensor_parallel"
    assert caught.value.hint


def test_an_adapter_that_is_more_than_two_matrices() -> None:
    model = wrap_causal_lm(tiny_model(num_hidden_layers=1)).model
    add_adapter(model, AdapterSpec(kind="dora", rank=4))
    with pytest.raises(ModelError, match="only plain linear maps"):
        tp_plan_of(model, World(0, 2, 0, 2, tp=TensorParallel(2, 0)))


def test_a_model_that_takes_whole_paths_only() -> None:
    model = wrap_causal_lm(tiny_model(num_hidden_layers=1)).model
    model.run_unpacked()
    with pytest.raises(ModelError, match="one path at a time"):
        tp_plan_of(model, World(0, 2, 0, 2, tp=TensorParallel(2, 0)))


def test_a_model_with_recurrent_layers() -> None:
    model = wrap_causal_lm(recurrent_model("lfm2")).model
    with pytest.raises(ModelError, match="recurrent layers") as caught:
        tp_plan_of(model, World(0, 2, 0, 2, tp=TensorParallel(2, 0)))
    assert caught.value.hint


@pytest.mark.parametrize("wrong", ["", "termed", "rows", "forward"])
def test_a_plan_that_is_wrong_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [wrap_causal_lm(tiny_model("qwen3", num_hidden_layers=2)).model for _ in range(2)]

    def cut(model: CausalLM, plan: TPPlan, ranks: World, _device: Any) -> Any:
        region = apply_tensor_parallel(plan, ranks.tp)
        if wrong == "rows":
            del plan.rowwise[-1].forward
        return SimpleNamespace(region=region, clear=region.clear)

    monkeypatch.setattr(assembled, "tensor_parallelize", cut)

    def run(ranks: World) -> str:
        model = models[ranks.rank]
        config = model.config.get_text_config()
        plan = dict(config.base_model_tp_plan)
        if wrong == "termed":
            plan = {key: style for key, style in plan.items() if "_norm" not in key}
        if wrong == "forward":
            del plan["layers.*.self_attn.q_proj"]
        config.base_model_tp_plan = plan
        try:
            assembled.tensor_parallelize_checked(model, ranks, torch.device("cpu"))
        except ModelError as error:
            return str(error)
        return "taken"

    said = on_ranks(2, run, monkeypatch)
    words = {"": "taken", "forward": "does not run in parts"}.get(wrong, "differs in parts")
    assert all(words in text for text in said), said


def test_a_plan_of_a_run_says_what_it_leaves_out(llama_folder: Path, chats: Path) -> None:
    recipe = {"model": str(llama_folder), "data": {"train": [str(chats)]}}
    options = ["device.kind=cpu", "train.steps=2", "batch.documents=1", "device.tensor_parallel=2"]
    found = forecast(read_recipe(recipe, [*options, "device.ranks=2"]))
    assert any("a rank has 1/2 of each" in warning for warning in found.warnings)
    with pytest.raises(RecipeError, match="3 ranks can't be divided"):
        forecast(read_recipe(recipe, [*options, "device.ranks=3"]))


# --- whole runs

STEPS = 4
COMMON = [f"train.steps={STEPS}", "model.dtype=float32", "optim.lr=0.003", "eval.every=2"]
COMMON += ["device.micro_tokens=96", "batch.documents=5"]
TENSOR = ["device.tensor_parallel=2"]
FAST = {
    "llama": (2, "llama", []),
    "qwen3": (4, "qwen3", ["optim=sgd", "optim.lr=0.05"]),
}
CHECKPOINTED = "device.gradient_checkpointing="
SLOW = {
    "tied": (2, "gemma2", [f"{CHECKPOINTED}selective", "optim=lion", "optim.lr=0.001"]),
    "recomputed": (2, "llama", [f"{CHECKPOINTED}layers", "train.result=best"]),
    "idle": (
        4,
        "qwen3",
        ["batch.documents=3", "device.micro_tokens=1", "optim=sgd", "optim.lr=0.05"],
    ),
    "top": (2, "llama", ["adapter.top_layers=1"]),
    "psft": (2, "llama", ["objective=psft", "objective.outer_steps=2"]),
    "anchor": (2, "llama", ["objective.kl=0.1"]),
    "noisy": (2, "llama", ["objective.neftune=5"]),
    "lora": (2, "gemma2", ["adapter=lora", "adapter.rank=4", "objective.kl=0.1"]),
    "narrow": (2, "llama", ["model.dtype=bfloat16", "optim.lr=0.001"]),
}
HALTED = "halted"
SEEDED = """
from tunesmith.checkpoint.rng import seed_step
from tunesmith.train.trainer import Trainer

one_step = Trainer._one_step

def seeded(self):
    seed_step(self.options.seed, self.step, 0)
    one_step(self)

Trainer._one_step = seeded
"""
"""Lets a process alone draw in each step what the first of several copies draws."""
ELSEWHERE = {
    "alone": (1, ["device.tensor_parallel=1"]),
    "copies": (4, ["device.tensor_parallel=2"]),
    "in shards": (2, ["device.tensor_parallel=1", "device.shard=full"]),
}


def again(out: Path, *overrides: str) -> dict[str, Any]:
    return {"call": "resume", "out": str(out), "overrides": list(overrides)}


def run_all(folder: Path, cases: dict[str, Any], *, halted: bool) -> Path:
    models = {
        family: str(tiny_folder(folder / f"model-{family}", family, num_hidden_layers=2))
        for family in {family for _, family, _ in cases.values()}
    }
    inputs = {
        "data": str(write_jsonl(folder / "rows.jsonl", chat_rows(12))),
        "eval": str(write_jsonl(folder / "eval.jsonl", chat_rows(17)[13:])),
    }

    def job(name: str, family: str, options: list[str], **more: Any) -> dict[str, Any]:
        out = str(folder / name)
        return {**inputs, "model": models[family], "out": out, "overrides": options, **more}

    alone, groups = [], []
    for name, (ranks, family, options) in cases.items():
        seeded = {"prelude": SEEDED} if name == "noisy" else {}
        alone.append(job(f"{name}-alone", family, [*COMMON, *options], **seeded))
        groups.append((ranks, [job(name, family, [*COMMON, *TENSOR, *options])]))
    if halted:
        stopped = [*COMMON, *TENSOR]
        groups.append((2, [job(HALTED, "llama", stopped, signal_after=[1, 2, signal.SIGTERM])]))
        groups.append((2, [again(folder / HALTED)]))
    else:
        stop = {"signal_after": [0, 2, signal.SIGTERM]}
        for name in ELSEWHERE:
            groups.append((2, [job(name, "llama", [*COMMON, *TENSOR], **stop)]))
        groups.append((1, [job("taken up", "llama", COMMON, **stop)]))
        groups += [(r, [again(folder / name, *o)]) for name, (r, o) in ELSEWHERE.items()]
        groups.append((2, [again(folder / "taken up", *TENSOR)]))
    codes, _ = run_groups([(1, alone), *groups])
    wanted = [[0] * ranks for ranks, _ in [(1, alone), *groups]]
    if halted:
        wanted[-2] = [143, 143]
    else:
        wanted[-8:-4] = [[143] * len(ranks) for ranks in wanted[-8:-4]]
    assert codes == wanted
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("tensor"), FAST, halted=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("tensors"), SLOW, halted=False)


@pytest.mark.parametrize("name", FAST)
def test_divided_layers_learn_what_one_process_does(fast: Path, name: str) -> None:
    assert_same_learning(fast / f"{name}-alone", fast / name, steps=STEPS)


def test_a_resume_is_the_run_to_the_bit(fast: Path) -> None:
    one, two = weights(fast / "llama"), weights(fast / HALTED)
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    assert losses(fast / HALTED) == losses(fast / "llama")


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_divided_layers_learn_the_same_in_every_way(slow: Path, name: str) -> None:
    if name != "narrow":
        assert_same_learning(slow / f"{name}-alone", slow / name, steps=STEPS)
        return
    one, many = slow / f"{name}-alone", slow / name
    np.testing.assert_allclose(losses(many), losses(one), rtol=2e-2)
    for key, tensor in weights(one).items():
        assert weights(many)[key].dtype == tensor.dtype == torch.bfloat16
        torch.testing.assert_close(weights(many)[key].float(), tensor.float(), rtol=0.05, atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ELSEWHERE, "taken up"])
def test_a_checkpoint_goes_on_with_other_numbers(slow: Path, name: str) -> None:
    assert_same_learning(slow / "recomputed-alone", slow / name, steps=STEPS)


def test_a_resume_with_another_division_is_not_to_the_bit(fast: Path) -> None:
    saved = load_checkpoint(fast / "llama" / "checkpoints" / f"step-{STEPS}").meta
    alone = load_checkpoint(fast / "llama-alone" / "checkpoints" / f"step-{STEPS}").meta
    assert "tensor parallel was 2, is 1" in differences(saved, alone)
    before = {key: value for key, value in alone.items() if key != "tensor"}
    assert not differences(before, alone)


def test_a_rank_saves_its_part_of_what_is_divided(fast: Path) -> None:
    parts = fast / "llama" / "checkpoints" / f"step-{STEPS}" / "parts"
    sizes = [path.stat().st_size for path in parts.glob("*.distcp")]
    assert len(sizes) == 2
    assert min(sizes) > 0.3 * max(sizes)
