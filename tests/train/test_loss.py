"""Paths as keys, noise, guesses and the old policy, each by itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiny import tiny_model
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.metrics.records import log_histogram, quantiles
from tunesmith.model.attention import dispatch as attention
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import read_logit_transform
from tunesmith.model.neftune import EmbeddingNoise
from tunesmith.objectives import named_objective
from tunesmith.train.loss import StepLoss, path_lengths
from tunesmith.train.microbatches import collate
from tunesmith.train.old_policy import OldPolicy
from tunesmith.train.path_hash import path_ends, target_keys, token_keys
from tunesmith.types import Document, Origin, Segment

attention.register()
CPU = torch.device("cpu")


def segment(ids, parent: int, start: int, index) -> Segment:
    return Segment(
        np.asarray(ids, np.int32), parent, start, np.array(index, np.int32),
        np.ones(len(index), np.float32), np.zeros(len(index), np.int32),
    )  # fmt: skip


def rows() -> list[Document]:
    """Two rows with a common beginning, one that branches, one that ends inside another."""
    made = [
        (segment([5, 6, 7, 8, 9], -1, 0, [3, 4]),),
        (segment([5, 6, 7, 10, 11, 12], -1, 0, [4, 5]),),
        (
            segment([5, 6, 13], -1, 0, [2]),
            segment([14, 15], 0, 3, [0, 1]),
            segment([16, 17, 18], 0, 3, [2]),
        ),
        (segment([5, 6, 7, 10], -1, 0, [2, 3]),),
    ]
    return [Document(segments, Origin("made", i)) for i, segments in enumerate(made)]


def wrapped() -> CausalLM:
    model = tiny_model("llama", attention="tunesmith")
    return CausalLM(model, logits=read_logit_transform(model.config), native_attention="eager")


def spelled(plan, token: int) -> tuple[int, ...]:
    """The ids of the path to a packed token, by the layout's own rule."""
    seen = [k for k in range(token + 1) if token < plan.layout.visible_until[k]]
    return tuple(int(plan.ids[k]) for k in seen)


@pytest.mark.parametrize(
    "layout", [{}, dict(share_prefixes=False), dict(micro_tokens=7), dict(unpacked=True)]
)
def test_a_key_stands_for_a_path_wherever_it_lies(layout: dict) -> None:
    known: dict[int, tuple[int, ...]] = {}
    for plan in plan_step(rows(), **{"micro_tokens": 100, **layout}):
        for token, key in enumerate(token_keys(plan).tolist()):
            assert known.setdefault(key, spelled(plan, token)) == spelled(plan, token)
    assert len(set(known.values())) == len(known)
    one = {k for p in plan_step(rows(), micro_tokens=100) for k in target_keys(p).tolist()}
    other = {
        k for p in plan_step(rows(), **{"micro_tokens": 100, **layout})
        for k in target_keys(p).tolist()
    }  # fmt: skip
    assert one == other


def test_ends_of_a_document_are_its_longest_ways() -> None:
    lengths = [sorted(path_ends(document).values()) for document in rows()]
    assert lengths == [[4], [5], [4, 5], [3]]


def test_the_old_policy_is_found_in_any_layout() -> None:
    outer = OldPolicy(first=2, steps=3)
    assert [outer.begins(step) for step in range(7)] == [
        False, False, True, False, False, True, False,
    ]  # fmt: skip
    plans = plan_step(rows(), micro_tokens=100)
    values = {key: float(i) for i, key in enumerate(target_keys(plans[0]).tolist())}
    outer.take(plans, [torch.tensor(list(values.values()))])
    again = OldPolicy(first=2, steps=3)
    again.restore(outer.tensors())
    for plan in plan_step(rows(), micro_tokens=5, share_prefixes=False):
        expected = [values[key] for key in target_keys(plan).tolist()]
        assert again.find(plan).tolist() == expected


def test_lengths_of_paths() -> None:
    for share in (True, False):
        for plan in plan_step(rows(), micro_tokens=100, share_prefixes=share):
            found = path_lengths(plan.layout)
            for token in range(len(plan.ids)):
                below = range(token, int(plan.layout.visible_until[token]))
                assert found[token] == 1 + max(int(plan.layout.position[q]) for q in below)


def test_noise_is_uniform_of_the_documents_own_size() -> None:
    model = wrapped()
    noise = EmbeddingNoise(model, alpha=5.0)
    embed = model.base.get_input_embeddings()
    ids = torch.randint(3, 400, (1, 4000))
    plain = embed(ids)
    lengths = torch.tensor([10] * 2000 + [1000] * 2000)
    with noise.over(lengths):
        added = (embed(ids) - plain)[0]
    assert torch.equal(embed(ids), plain)
    for part, length in ((added[:2000], 10), (added[2000:], 1000)):
        size = 5 / (length * 64) ** 0.5
        assert part.abs().max() <= size * 1.001
        assert part.abs().max() > size * 0.99
        assert part.mean().abs() < size * 0.02
        assert part.std().item() == pytest.approx(size / 3**0.5, rel=0.02)


def test_lengths_do_not_depend_on_neighbours() -> None:
    alone = [
        path_lengths(plan.layout)
        for document in rows()[:2]
        for plan in plan_step([document], micro_tokens=100)
    ]
    (together,) = plan_step(rows()[:2], micro_tokens=100, share_prefixes=False)
    assert sorted(path_lengths(together.layout).tolist()) == sorted(np.concatenate(alone).tolist())


@pytest.mark.parametrize("unpacked", [False, True])
def test_guesses_replace_targets_where_they_are_read(unpacked: bool) -> None:
    """At the last step with probability 1 every target that is read is the model's guess."""
    model = wrapped()
    if unpacked:
        model.run_unpacked()
    loss = StepLoss(named_objective("nll"), steps=5, sampling=1.0, step=4)
    documents = rows()[:2]
    for plan in plan_step(documents, micro_tokens=100, share_prefixes=False, unpacked=unpacked):
        batch = collate(plan, CPU)
        found = loss._with_guesses(model, batch, plan)
        logits = model.head(model.hidden(batch))
        expected = batch.input_ids.clone()
        for source, target in zip(batch.source.tolist(), batch.target.tolist(), strict=True):
            inside = source + 1 < int(plan.layout.visible_until[source])
            if inside:
                assert int(batch.input_ids[source + 1]) == target
                expected[source + 1] = logits[source].argmax()
        assert torch.equal(found.input_ids, expected)
        assert not torch.equal(found.input_ids, batch.input_ids)
        assert torch.equal(found.target, batch.target)


def test_guesses_are_as_frequent_as_the_step_asks() -> None:
    """At the middle of the run, half of the probability of its end."""
    model = wrapped()
    (plan,) = plan_step(rows()[:2], micro_tokens=100, share_prefixes=False)
    batch = collate(plan, CPU)
    all_of_them = StepLoss(named_objective("nll"), steps=5, sampling=1.0, step=4)
    places = all_of_them._with_guesses(model, batch, plan).input_ids != batch.input_ids
    loss = StepLoss(named_objective("nll"), steps=5, sampling=0.6, step=2)
    torch.manual_seed(0)
    drawn = [loss._with_guesses(model, batch, plan).input_ids for _ in range(1000)]
    changed = torch.stack([ids != batch.input_ids for ids in drawn])
    assert places.sum() >= 2
    assert not changed[:, ~places].any()
    share = changed[:, places].float().mean(0)
    assert ((share - 0.3).abs() < 0.06).all()  # four standard errors


def test_guesses_grow_from_none() -> None:
    model = wrapped()
    (plan,) = plan_step(rows()[:1], micro_tokens=100)
    batch = collate(plan, CPU)
    loss = StepLoss(named_objective("nll"), steps=5, sampling=1.0)
    assert loss._with_guesses(model, batch, plan) is batch


def test_quantiles_add_up_over_parts() -> None:
    generator = np.random.default_rng(0)
    values, weight = generator.normal(1, 2, 20000), generator.uniform(0.5, 1.5, 20000)
    parts = [log_histogram(values[i::3], weight[i::3]) for i in range(3)]
    found = quantiles(np.sum(parts, axis=0))
    order = np.argsort(values)
    reached = np.cumsum(weight[order]) / weight.sum()
    for share, value in found.items():
        exact = values[order][np.searchsorted(reached, share)]
        assert np.log(value) == pytest.approx(exact, abs=0.07)


def test_a_quantile_of_equal_values_is_their_value() -> None:
    found = quantiles(log_histogram(np.zeros(5), np.ones(5)))
    assert list(found.values()) == [1.0, 1.0, 1.0]


def test_quantiles_of_clipped_and_of_nothing() -> None:
    found = quantiles(log_histogram(np.array([-np.inf, -np.inf, 1.0, 100.0]), np.ones(4)))
    assert found[0.5] < 0.001
    assert found[0.99] > 1e17
    assert quantiles(log_histogram(np.empty(0), np.empty(0))) == {}
