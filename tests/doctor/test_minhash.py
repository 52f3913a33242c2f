"""Near pairs against counting all pairs."""

from __future__ import annotations

import random

import pytest
from planted import WORDS

from tunesmith.doctor.minhash import SIZE, Pair, near_pairs

LEAST = 5


def runs(words: list[str]) -> set[tuple[str, ...]]:
    if len(words) < SIZE:
        return {tuple(words)} if words else set()
    return {tuple(words[at : at + SIZE]) for at in range(len(words) - SIZE + 1)}


def all_pairs(texts: list[list[str]], threshold: float) -> dict[tuple[int, int], float]:
    """Every pair at least that alike, counted one by one."""
    found = {}
    for second, words in enumerate(texts):
        for first in range(second):
            a, b = runs(texts[first]), runs(words)
            if min(len(a), len(b)) >= LEAST and len(a & b) / len(a | b) >= threshold:
                found[first, second] = len(a & b) / len(a | b)
    return found


def texts_with_copies(seed: int, count: int = 120) -> list[list[str]]:
    """Random texts; every third is an earlier one with some words changed."""
    draw = random.Random(seed)
    texts: list[list[str]] = []
    for number in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(0, 60))]
        if number % 3 == 2:
            words = list(draw.choice(texts))
            for _ in range(draw.randint(0, 3)):
                if words:
                    words[draw.randrange(len(words))] = draw.choice(WORDS)
        texts.append(words)
    return texts


@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_true_and_each_like_text_has_one(seed: int) -> None:
    texts = texts_with_copies(seed)
    wanted = all_pairs(texts, 0.8)
    found = {(p.first, p.second): p.alike for p in near_pairs(texts, threshold=0.8, least=LEAST)}
    assert wanted
    for pair, alike in found.items():
        assert alike == pytest.approx(wanted[pair])
    assert {second for _, second in found} == {second for _, second in wanted}


def test_a_crowd_of_equals_gives_few_pairs() -> None:
    words = random.Random(1).sample(WORDS, 30)
    pairs = near_pairs([words] * 50, threshold=0.8, least=LEAST)
    assert len(pairs) <= 2 * 50
    assert {pair.second for pair in pairs} == set(range(1, 50))
    assert Pair(0, 49, 1.0) in pairs


@pytest.mark.parametrize("texts", [[], [[]], [["a"]], [["a", "b"]] * 3, [[], [], []]])
def test_texts_too_short_to_compare_have_no_pairs(texts: list[list[str]]) -> None:
    assert near_pairs(texts, threshold=0.5, least=LEAST) == []


def test_least_decides_which_texts_are_compared() -> None:
    text = ["one", "two", "three", "four", "five", "six"]
    assert near_pairs([text, text], threshold=0.8, least=4) == [Pair(0, 1, 1.0)]
    assert near_pairs([text, text], threshold=0.8, least=5) == []


def test_the_order_of_words_counts() -> None:
    words = random.Random(2).sample(WORDS, 30)
    assert near_pairs([words, sorted(words)], threshold=0.3, least=LEAST) == []


def test_texts_over_one_chunk_agree_with_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = texts_with_copies(9)
    whole = near_pairs(texts, threshold=0.7, least=LEAST)
    monkeypatch.setattr("tunesmith.doctor.minhash._CHUNK", 50)
    assert near_pairs(texts, threshold=0.7, least=LEAST) == whole
