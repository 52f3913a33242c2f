"""Batched answers are those of each row alone, and come from the model's own arg max."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from tiny import FAMILIES, tiny_folder
from tunesmith.data.templates.load import load_template
from tunesmith.errors import DataError
from tunesmith.generate import generate, stream
from tunesmith.generate.batched import RowSampler
from tunesmith.model.load import load_causal_lm, resolve_model

PROMPTS = [[5, 9, 13], list(range(20, 60)), [7], [11, 40, 300, 22, 90, 17, 33], [8, 8, 8, 200]]


def load(folder: Path, family: str = "llama"):
    tiny_folder(folder, family)
    return load_causal_lm(resolve_model(str(folder)), dtype="float32").model, load_template(folder)


def argmax_loop(model, template, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding by hand: no cache, no padding, no loop of transformers."""
    ids = list(prompt)
    with model.generation() as plain, torch.no_grad():
        for _ in range(count):
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] in template.stop_ids:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rows_do_not_depend_on_their_batch(family: str, tmp_path: Path):
    model, template = load(tmp_path / "base", family)
    together = generate(model, template, PROMPTS, max_new_tokens=12)
    expected = [argmax_loop(model, template, prompt, 12) for prompt in PROMPTS]
    assert [list(answer.ids) for answer in together] == expected
    in_pairs = generate(model, template, PROMPTS, max_new_tokens=12, batch_tokens=60)
    assert in_pairs == together


def test_ends_at_every_stop_id(tmp_path: Path):
    model, template = load(tmp_path / "base")
    free = generate(model, template, PROMPTS, max_new_tokens=12)
    stop = free[1].ids[4]
    template = dataclasses.replace(template, stop_ids=frozenset({stop, *template.stop_ids}))
    answers = generate(model, template, PROMPTS, max_new_tokens=12)
    for answer, before in zip(answers, free, strict=True):
        cut = before.ids.index(stop) + 1 if stop in before.ids else 12
        assert answer.ids == before.ids[:cut]
        assert answer.stopped == (answer.ids[-1] in template.stop_ids)
    assert answers[1].stopped
    expected = template.tokenizer.decode(answers[1].ids[:-1], skip_special_tokens=True)
    assert answers[1].text == expected


def test_the_models_own_sampling_defaults_are_not_used(tmp_path: Path):
    base = tiny_folder(tmp_path / "base")
    plain, template = load(tmp_path / "plain")
    values = {"eos_token_id": 2, "repetition_penalty": 9.0, "do_sample": True, "top_k": 3}
    (base / "generation_config.json").write_text(json.dumps(values))
    model = load_causal_lm(resolve_model(str(base)), dtype="float32").model
    own = model.base.generation_config
    answers = generate(model, template, PROMPTS, max_new_tokens=12)
    assert answers == generate(plain, template, PROMPTS, max_new_tokens=12)
    assert model.base.generation_config is own
    assert own.repetition_penalty == 9.0


def test_sampling_depends_on_seed_and_row_alone(tmp_path: Path):
    model, template = load(tmp_path / "base")
    options = {"max_new_tokens": 10, "temperature": 1.0}
    together = generate(model, template, PROMPTS, seed=3, **options)
    assert generate(model, template, PROMPTS, seed=3, batch_tokens=1, **options) == together
    assert generate(model, template, PROMPTS, seed=4, **options) != together
    twice = generate(model, template, [PROMPTS[0]] * 2, seed=3, **options)
    assert twice[0] == together[0]
    assert twice[0] != twice[1]
    state = torch.get_rng_state()
    generate(model, template, PROMPTS, seed=3, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_samples_follow_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = 4000
    scores = (2.0 * p.log()).repeat(rows, 1)  # temperature 2 brings p back
    drawn = RowSampler(range(rows), temperature=2.0, top_p=1.0, seed=0)(None, scores).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / rows
    torch.testing.assert_close(shares, p, atol=0.03, rtol=0)
    nucleus = RowSampler(range(rows), temperature=2.0, top_p=0.7, seed=0)(None, scores).argmax(-1)
    counts = Counter(nucleus.tolist())
    assert set(counts) == {0, 1}
    assert counts[0] / rows == pytest.approx(0.625, abs=0.03)


def test_streamed_pieces_are_the_answer(tmp_path: Path):
    model, template = load(tmp_path / "base")
    for prompt, answer in zip(
        PROMPTS, generate(model, template, PROMPTS, max_new_tokens=12), strict=True
    ):
        pieces: list[str] = []
        assert stream(model, template, prompt, pieces.append, max_new_tokens=12) == answer
        assert "".join(pieces) == answer.text


def test_the_context_bounds_new_tokens(tmp_path: Path):
    model, template = load(tmp_path / "base")
    context = template.context_length
    long = [9 + i % 100 for i in range(context - 3)]
    answers = generate(model, template, [long, [5, 6]], max_new_tokens=20)
    assert len(answers[0].ids) <= 3
    with pytest.raises(DataError, match="context"):
        generate(model, template, [[5], [9] * context], max_new_tokens=5)


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_out_of_range_are_refused(options: dict, tmp_path: Path):
    model, template = load(tmp_path / "base")
    with pytest.raises(DataError):
        generate(model, template, PROMPTS, **{"max_new_tokens": 4, **options})


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model, template = load(tmp_path / "base")
    model.train()
    before = (model.base.config._attn_implementation, model.base.config.use_cache, model.training)
    generate(model, template, PROMPTS, max_new_tokens=3)
    after = (model.base.config._attn_implementation, model.base.config.use_cache, model.training)
    assert after == before


def test_no_prompts_no_answers(tmp_path: Path):
    model, template = load(tmp_path / "base")
    assert generate(model, template, [], max_new_tokens=3) == []


def test_a_character_of_several_tokens_is_shown_whole(tmp_path: Path):
    from tunesmith.generate.stream import _Pieces

    _, template = load(tmp_path / "base")
    pieces: list[str] = []
    streamer = _Pieces(template, pieces.append)
    text = "Größe 🙂 ja"
    ids = template.tokenizer(text)["input_ids"]
    assert len(ids) > len(text) - 2
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in [*ids, min(template.stop_ids)]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
