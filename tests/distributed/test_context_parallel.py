"""Ranks that share the tokens of a micro-batch learn what one process learns."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tunesmith
from attention_oracle import softmax_over_mask, visible
from gang import assert_same_learning, losses, records, run_groups, weights
from recurrent_models import recurrent_model
from tiny import chat_rows, tiny_folder, tiny_model, write_jsonl
from tunesmith.build.context_parallel import check_exact, check_model, context_line
from tunesmith.checkpoint.folder import differences, load_checkpoint
from tunesmith.cli.plan import lines
from tunesmith.config.compatibility import Facts, check_together
from tunesmith.config.read import read_recipe
from tunesmith.data.microbatch.planner import MicrobatchPlan, plan_step
from tunesmith.distributed.context_parallel import ContextParallel
from tunesmith.distributed.world import World
from tunesmith.errors import ModelError, RecipeError
from tunesmith.estimate import forecast
from tunesmith.model.attention.dispatch import MaskRule, layout_attention
from tunesmith.model.load import wrap_causal_lm
from tunesmith.train.loss import path_lengths
from tunesmith.train.microbatches import collate, local_part
from tunesmith.train.path_hash import target_keys
from tunesmith.types import Document, Origin, Segment

# --- slices of a micro-batch


def document(ids: list[int], number: int) -> Document:
    place = np.arange(1, len(ids), dtype=np.int32)
    weight = 0.5 + (np.asarray(ids[1:], np.float32) + number) % 3
    segment = Segment(np.asarray(ids, np.int32), -1, 0, place, weight, np.zeros_like(place))
    return Document((segment,), Origin("rows", number))


ROWS = [
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13],
    [1, 2, 3, 4, 20, 21, 22],
    [1, 2, 3, 4, 20, 30],
    [40, 41, 42, 43, 44],
    [1, 2, 50, 51, 52, 53, 54, 55, 56],
]
"""Three branches at two depths, and a document by itself."""


def whole_plan(rows: list[list[int]] = ROWS) -> MicrobatchPlan:
    (plan,) = plan_step([document(row, n) for n, row in enumerate(rows)], micro_tokens=1000)
    return plan


def parts_of(plan: MicrobatchPlan, count: int) -> list[MicrobatchPlan]:
    return [local_part(plan, ContextParallel(count, place)) for place in range(count)]


def entries(plan: MicrobatchPlan, start: int) -> tuple[list[Any], list[Any]]:
    """(source, target, weight) of each target, and each share as (target, document, weight)."""
    source = (plan.source + start).tolist()
    targets = list(zip(source, plan.target.tolist(), plan.weight.tolist(), strict=True))
    s = plan.owners
    triples = zip(s.target.tolist(), s.document.tolist(), s.weight.tolist(), strict=True)
    return targets, [(targets[t], d, w) for t, d, w in triples]


@settings(deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=9), min_size=1, max_size=6),
    count=st.integers(2, 7),
)
def test_parts_have_every_token_and_target_once(rows: list[list[int]], count: int) -> None:
    plan = whole_plan(rows)
    parts = parts_of(plan, count)
    assert len({part.tokens for part in parts}) == 1
    assert parts[0].tokens == -(-plan.tokens // count)
    ids = np.concatenate([part.ids for part in parts])
    position = np.concatenate([collate(part).position_ids.numpy() for part in parts])
    assert ids[: plan.tokens].tolist() == plan.ids.tolist()
    assert position[: plan.tokens].tolist() == plan.layout.position.tolist()
    every = entries(plan, 0)
    found = [entries(part, part.layout.local.start) for part in parts]
    for kind in (0, 1):
        assert sorted(e for entry in found for e in entry[kind]) == sorted(every[kind])
    assert np.concatenate([target_keys(part) for part in parts]).tolist() == (
        target_keys(plan).tolist()
    )


def test_nobody_sees_what_is_added() -> None:
    plan = whole_plan()
    layout = local_part(plan, ContextParallel(7, 0)).layout
    total = len(layout.position)
    assert total % 7 == 0
    assert total > plan.tokens
    for key in range(plan.tokens, total):
        assert layout.visible_until[key] == key + 1
    assert (layout.visible_until[: plan.tokens] <= plan.tokens).all()
    assert [(c.start, c.end) for c in layout.chains][-1] == (total - 1, total)
    lengths = path_lengths(layout)
    assert lengths[: plan.tokens].tolist() == path_lengths(plan.layout).tolist()


def test_alone_nothing_is_cut() -> None:
    plan = whole_plan()
    assert local_part(plan, ContextParallel()) is plan


# --- attention, the ranks as threads


class Exchange:
    """What ranks send each other, between threads of one process."""

    def __init__(self, count: int) -> None:
        self.barrier = Barrier(count, timeout=30)
        self.boxes: list[Any] = [None] * count

    def of(self, place: int) -> Callable[[Tensor, Tensor], None]:
        def swap(received: Tensor, sent: Tensor) -> None:
            self.boxes[place] = sent
            self.barrier.wait()
            for rank, box in enumerate(self.boxes):
                received[rank].copy_(box[place])
            self.barrier.wait()

        return swap


def on_ranks(
    count: int, act: Callable[[ContextParallel], Any], monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """What `act` returns on each of so many ranks."""
    monkeypatch.setattr(
        torch.distributed, "all_to_all_single", lambda out, given, group: group(out, given)
    )
    exchange = Exchange(count)
    found: list[Any] = [None] * count

    def run(place: int) -> None:
        try:
            found[place] = act(ContextParallel(count, place, exchange.of(place)))
        except BaseException as error:
            exchange.barrier.abort()
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


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fewer key heads": {"heads": 8, "groups": 2},
    "key heads that must be repeated": {"heads": 12, "groups": 3},
    "one key head": {"groups": 1},
    "sliding": {"size": 4},
    "chunked": {"size": 4, "chunked": True},
    "softcap, sliding": {"softcap": 1.5, "size": 4, "groups": 2},
    "sinks": {"sinks": True, "heads": 8, "groups": 4},
    "sinks, sliding": {"sinks": True, "size": 4, "groups": 2},
    "narrow values": {"value_width": 8},
}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_attention_and_its_gradients(
    case: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"heads": 4, "groups": 4, "size": None, "chunked": False, "value_width": 16}
    options |= {"softcap": None, "sinks": False, **CASES[case]}
    plan = whole_plan()
    generator = torch.Generator().manual_seed(0)
    shapes = [(options["heads"], 16), (options["groups"], 16)]
    shapes.append((options["groups"], options["value_width"]))
    whole = [
        torch.randn(1, h, plan.tokens, d, generator=generator).requires_grad_() for h, d in shapes
    ]
    sinks = torch.randn(options["heads"], generator=generator).requires_grad_()
    toward = torch.randn(1, plan.tokens, options["heads"], options["value_width"])
    mask = visible(plan.layout, size=options["size"], chunked=options["chunked"])
    wanted = softmax_over_mask(
        *whole,
        mask,
        scale=16**-0.5,
        softcap=options["softcap"],
        sinks=sinks if options["sinks"] else None,
    )
    (wanted * toward).sum().backward()
    kinds = ["chunked_attention" if options["chunked"] else "full_attention"]
    module: Any = SimpleNamespace(config=SimpleNamespace(layer_types=kinds), training=False)

    def run(context: ContextParallel) -> list[Tensor]:
        layout = context.shard(plan.layout)
        more = len(layout.position) - plan.tokens
        own = [
            torch.nn.functional.pad(t.detach(), (0, 0, 0, more))[:, :, layout.local]
            .clone().requires_grad_() for t in whole
        ]  # fmt: skip
        mine = sinks.detach().clone().requires_grad_()
        output, _ = layout_attention(
            module, *own, MaskRule(options["size"]), layout=layout, softcap=options["softcap"],
            s_aux=mine if options["sinks"] else None,
        )  # fmt: skip
        given = torch.nn.functional.pad(toward, (0, 0, 0, 0, 0, more))[:, layout.local]
        (output * given).sum().backward()
        zero = torch.zeros_like(sinks)
        return [output.detach(), *(t.grad for t in own), zero if mine.grad is None else mine.grad]

    found = on_ranks(count, run, monkeypatch)
    output = torch.cat([rank[0] for rank in found], 1)[:, : plan.tokens]
    torch.testing.assert_close(output, wanted.detach(), rtol=1e-4, atol=1e-5)
    for number, tensor in enumerate(whole, start=1):
        grad = torch.cat([rank[number] for rank in found], 2)[:, :, : plan.tokens]
        torch.testing.assert_close(grad, tensor.grad, rtol=1e-4, atol=1e-5)
    if options["sinks"]:
        added = torch.stack([rank[4] for rank in found]).sum(0)
        torch.testing.assert_close(added, sinks.grad, rtol=1e-4, atol=1e-5)


def test_heads_that_cannot_be_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = whole_plan()

    def run(context: ContextParallel) -> None:
        layout = context.shard(plan.layout)
        assert layout.shard is not None
        tensor = torch.zeros(1, 4, layout.local.stop - layout.local.start, 8)
        layout.shard.seq_to_heads(tensor, tensor, tensor)

    with pytest.raises(ModelError, match="4 attention heads can't be dealt to 3 ranks") as caught:
        on_ranks(3, run, monkeypatch)
    assert caught.value.hint == "device.context_parallel=2"


# --- what is refused


def check(ranks: World, *overrides: str) -> None:
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, list(overrides))
    check_together(recipe, Facts(ranks.size, ranks.local_size, "cpu"))


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["device.attention=unpacked"], "device.attention"),
        (["objective.router_aux=0.01"], "objective.router_aux"),
        (["objective.scheduled_sampling=0.1"], "objective.scheduled_sampling"),
    ],
)
def test_what_needs_whole_paths_names_its_key(overrides: list[str], key: str) -> None:
    check(World(0, 2, 0, 2), *overrides)
    with pytest.raises(RecipeError) as caught:
        check(World(0, 2, 0, 2), "device.context_parallel=2", *overrides)
    assert caught.value.where == key
    assert caught.value.hint


def test_ranks_that_make_no_whole_groups() -> None:
    check(World(0, 6, 0, 6), "device.context_parallel=3")
    with pytest.raises(RecipeError, match="6 ranks can't be divided into groups of 4") as caught:
        check(World(0, 6, 0, 6), "device.context_parallel=4")
    assert caught.value.hint == "device.context_parallel=3, or a multiple of 4 ranks"
    with pytest.raises(RecipeError, match="nobody to share a sequence with"):
        check(World(), "device.context_parallel=2")


def test_a_model_whose_heads_cannot_be_dealt() -> None:
    model = wrap_causal_lm(tiny_model(num_hidden_layers=1)).model
    with pytest.raises(ModelError, match="4 attention heads can't be dealt to 3 ranks"):
        check_model(model, ContextParallel(3, 0))


def test_a_model_that_takes_whole_paths_only() -> None:
    model = wrap_causal_lm(tiny_model(num_hidden_layers=1)).model
    model.run_unpacked()
    check_model(model, ContextParallel())
    with pytest.raises(ModelError, match="one path at a time") as caught:
        check_model(model, ContextParallel(2, 0))
    assert caught.value.hint == "device.context_parallel=1"


def test_a_model_with_recurrent_layers() -> None:
    model = wrap_causal_lm(recurrent_model("lfm2")).model
    with pytest.raises(ModelError, match="recurrent layers") as caught:
        check_model(model, ContextParallel(2, 0))
    assert caught.value.hint


def test_a_model_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [wrap_causal_lm(tiny_model(num_hidden_layers=1)).model for _ in range(2)]

    def run(context: ContextParallel) -> str:
        model = models[context.rank]
        ranks: Any = SimpleNamespace(cp=context, all_reduce_max=list)
        where = {"device": torch.device("cpu"), "compute": torch.float32}
        check_exact(model, ranks, **where)
        hidden = model.hidden

        def shifted(batch: Any, **options: Any) -> Tensor:
            moved = batch.layout is not None and batch.layout.shard is not None
            return hidden(batch, **options) + 0.01 * moved

        model.hidden = shifted
        try:
            check_exact(model, ranks, **where)
        except ModelError as error:
            return str(error)
        return "taken"

    said = on_ranks(2, run, monkeypatch)
    assert all("gives other results where ranks share its tokens" in text for text in said)


def test_the_start_says_how_a_micro_batch_is_spread() -> None:
    assert context_line(1, 4, longest=100) == []
    (line,) = context_line(2, 8, longest=9001)
    assert "4 groups of 2 ranks" in line
    assert "at most 4,501 on a rank" in line


def test_a_plan_is_of_one_rank(llama_folder: Path, chats: Path) -> None:
    recipe = {"model": str(llama_folder), "data": {"train": [str(chats)]}}
    options = ["device.kind=cpu", "device.micro_tokens=1", "train.steps=2", "batch.documents=1"]
    options.append("device.gradient_checkpointing=none")
    alone = forecast(read_recipe(recipe, options))
    shared = forecast(
        read_recipe(recipe, [*options, "device.context_parallel=2", "device.ranks=4"])
    )
    assert alone.context == ()
    assert "2 groups of 2 ranks" in shared.context[0]
    assert "memory is that of one rank" in "\n".join(lines(shared))
    assert shared.measured.activations < 0.6 * alone.measured.activations
    assert shared.work.computed == alone.work.computed
    with pytest.raises(RecipeError, match="3 ranks can't be divided"):
        forecast(read_recipe(recipe, [*options, "device.context_parallel=2", "device.ranks=3"]))
    with pytest.raises(ModelError, match="attention heads can't be dealt to 3 ranks"):
        forecast(read_recipe(recipe, [*options, "device.context_parallel=3"]))


# --- whole runs

STEPS = 4
COMMON = [f"train.steps={STEPS}", "model.dtype=float32", "optim.lr=0.003", "eval.every=2"]
COMMON += ["device.micro_tokens=96", "batch.documents=5"]
CONTEXT = ["device.context_parallel=2"]
CHECKPOINTED = "device.gradient_checkpointing="
LORA = ["adapter=lora", "adapter.rank=4"]
FAST = {
    "whole": (2, "llama", []),
    "shards": (2, "gemma2", ["device.shard=full", f"{CHECKPOINTED}selective"]),
}
SLOW = {
    "sinks": (2, "gpt_oss", []),
    "lora": (2, "gemma2", [*LORA, f"{CHECKPOINTED}layers"]),
    "shards of layers": (2, "llama", ["device.shard=full", f"{CHECKPOINTED}2"]),
    "psft": (2, "llama", ["objective=psft", "objective.outer_steps=2"]),
    "anchor": (2, "llama", ["objective.kl=0.1"]),
    "two groups": (4, "llama", []),
    "two groups of shards": (4, "gemma2", ["device.shard=full"]),
    "two machines": (4, "llama", ["device.shard=hybrid"]),
    "four": (4, "gemma2", ["device.context_parallel=4"]),
}
HALTED, WHOLE = "halted", "whole"


def rows(count: int) -> list[dict]:
    """Short chats with one beginning, and one long document."""
    long = " ".join(f"{n} is a number and {n + 1} is another." for n in range(24))
    message = {"role": "user", "content": "Go on."}, {"role": "assistant", "content": long}
    return [*chat_rows(count - 1), {"messages": list(message)}]


def run_all(folder: Path, cases: dict[str, Any], *, halted: bool) -> Path:
    models = {
        family: str(tiny_folder(folder / family, family, num_hidden_layers=2))
        for family in {family for _, family, _ in cases.values()}
    }
    inputs = {
        "data": str(write_jsonl(folder / "rows.jsonl", rows(12))),
        "eval": str(write_jsonl(folder / "eval.jsonl", chat_rows(17)[13:])),
    }

    def job(name: str, family: str, options: list[str], **more: Any) -> dict[str, Any]:
        out = str(folder / name)
        return {**inputs, "model": models[family], "out": out, "overrides": options, **more}

    alone, groups = [], []
    for name, (ranks, family, options) in cases.items():
        here = [o for o in options if not o.startswith(("device.shard", "device.context_parallel"))]
        alone.append(job(f"{name}-alone", family, [*COMMON, *here]))
        groups.append((ranks, [job(name, family, [*COMMON, *CONTEXT, *options])]))
    if halted:
        stopped = [*COMMON, *CONTEXT]
        groups.append((2, [job(HALTED, "llama", stopped, signal_after=[1, 2, signal.SIGTERM])]))
        again = {"call": "resume", "out": str(folder / HALTED), "overrides": []}
        groups.append((2, [again]))
    codes, _ = run_groups([(1, alone), *groups], machine=2)
    wanted = [[0] * ranks for ranks, _ in [(1, alone), *groups]]
    if halted:
        wanted[-2] = [143, 143]
    assert codes == wanted
    return folder


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("context"), FAST, halted=True)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_all(tmp_path_factory.mktemp("contexts"), SLOW, halted=False)


@pytest.mark.parametrize("name", FAST)
def test_shared_tokens_learn_what_one_process_does(fast: Path, name: str) -> None:
    assert_same_learning(fast / f"{name}-alone", fast / name, steps=STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_shared_tokens_learn_the_same_in_every_way(slow: Path, name: str) -> None:
    assert_same_learning(slow / f"{name}-alone", slow / name, steps=STEPS)


def test_a_rank_has_a_slice_and_not_the_micro_batch(fast: Path) -> None:
    one = sum(r["computed_tokens"] for r in records(fast / "whole-alone", "train"))
    both = sum(r["computed_tokens"] for r in records(fast / "whole", "train"))
    # larger micro-batches share more prefixes; each may have one token added
    assert both <= one + STEPS * 10


def test_a_resume_is_the_run_to_the_bit(fast: Path) -> None:
    one, two = weights(fast / WHOLE), weights(fast / HALTED)
    assert all(torch.equal(two[key], tensor) for key, tensor in one.items())
    assert losses(fast / HALTED) == losses(fast / WHOLE)


def test_a_resume_with_another_group_is_not_to_the_bit(fast: Path) -> None:
    saved = load_checkpoint(fast / "whole" / "checkpoints" / f"step-{STEPS}").meta
    alone = load_checkpoint(fast / "whole-alone" / "checkpoints" / f"step-{STEPS}").meta
    assert "context parallel was 2, is 1" in differences(saved, alone)
    before = {key: value for key, value in alone.items() if key != "context"}
    assert not differences(before, alone)


def test_one_process_has_nobody_to_share_with(llama_folder: Path, chats: Path) -> None:
    with pytest.raises(RecipeError, match="nobody to share a sequence with"):
        tunesmith.train(model=llama_folder, data=chats, overrides=["device.context_parallel=2"])
