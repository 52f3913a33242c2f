"""Every fault that is planted is found, in the rows it was planted in and in no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from planted import Planted, clean_rows, planted, write_lines, write_model

from tunesmith.config.read import read_recipe
from tunesmith.data.templates.load import load_template
from tunesmith.doctor.catalogue import CHECKS
from tunesmith.doctor.corpus import Corpus, Setup
from tunesmith.doctor.examine import plan_order, read_corpus, read_setup

ELSEWHERE = {
    "common-opening", "generation-stops", "unread-fields", "renamed-fields", "no-chat-template",
    "other-faults", "outside-vocabulary",
    "over-context", "pad-is-stop", "small-data", "template-date", "template-differs",
}  # fmt: skip
"""Checks of the model, or of all rows together, which have tests of their own."""


class Patient(NamedTuple):
    corpus: Corpus
    setup: Setup
    folder: Path

    def hits(self, check: str) -> set[str]:
        """Where the check finds something, as `train:row` or `eval:row`."""
        found = CHECKS[check].run(self.corpus, self.setup).hits
        start = f"{self.folder}/"
        return {hit.where.removeprefix(start).replace(".jsonl", "") for hit in found}


def patient(folder: Path, rows: Planted) -> Patient:
    model = write_model(folder / "model")
    train = write_lines(folder / "train.jsonl", rows.train)
    held_out = write_lines(folder / "eval.jsonl", rows.held_out)
    data = {"train": str(train), "eval": str(held_out)}
    recipe = read_recipe({"model": str(model), "data": data})
    template = load_template(model)
    corpus = read_corpus(recipe, template)
    return Patient(corpus, read_setup(recipe, template, plan_order(recipe, corpus)[0]), folder)


@pytest.fixture(scope="module")
def rows() -> Planted:
    return planted()


@pytest.fixture(scope="module")
def sick(rows: Planted, tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return patient(tmp_path_factory.mktemp("sick"), rows)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    rows = Planted()
    for row in clean_rows(400, 3):
        rows.add(row)
    for row in clean_rows(100, 4):
        rows.add(row, held_out=True)
    return patient(tmp_path_factory.mktemp("healthy"), rows)


def test_every_check_has_a_planted_fault_or_a_test_elsewhere(rows: Planted) -> None:
    assert set(rows.expected) | ELSEWHERE == set(CHECKS)
    assert not set(rows.expected) & ELSEWHERE


@pytest.mark.parametrize("check", sorted(set(CHECKS) - ELSEWHERE))
def test_planted_rows_are_found_and_no_others(check: str, sick: Patient, rows: Planted) -> None:
    assert sick.hits(check) == rows.expected[check]


@pytest.mark.parametrize("check", sorted(CHECKS))
def test_clean_rows_pass(check: str, healthy: Patient) -> None:
    if check == "small-data":
        pytest.skip("a test corpus is small; tested by itself")
    assert healthy.hits(check) == set()


def test_the_corpus_is_the_same_for_a_seed() -> None:
    assert planted(seed=5).train == planted(seed=5).train
    assert planted(seed=5).train != planted(seed=6).train


def test_clean_rows_are_json_without_planted_words() -> None:
    text = json.dumps(clean_rows(50, 1))
    assert "lighthouse" not in text.lower()


@pytest.mark.parametrize("seed", [11, 12])
def test_other_corpora_give_the_same(seed: int, tmp_path: Path) -> None:
    rows = planted(seed=seed)
    examined = patient(tmp_path, rows)
    assert {check: examined.hits(check) for check in rows.expected} == rows.expected
