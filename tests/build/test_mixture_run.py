"""Sources, weights and passes in whole runs."""

from __future__ import annotations

import json
from collections import Counter
from importlib import import_module
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.data.sources.hub import HubFiles
from tunesmith.errors import DataError, InputError, RecipeError
from tunesmith.run import resume, train

BASE = ["batch.documents=4", "checkpoint.every=null", "device.threads=1", "optim.lr=1e-2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a folder with six chats, and two others."""
    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model", num_hidden_layers=1)
    (place / "many").mkdir()
    rows = chat_rows(8)
    write_jsonl(place / "many" / "b.jsonl", rows[:2])
    write_jsonl(place / "many" / "a.jsonl", rows[2:6])
    write_jsonl(place / "few.jsonl", rows[6:])
    return place


def run(given: Path, out: Path, *overrides: str, **data: object) -> Path:
    recipe = {"model": str(given / "model"), "data": data}
    train(recipe, out=out, overrides=[*BASE, *overrides], progress=False)
    return out


def seen(out: Path) -> Counter[str]:
    """How often each row was learned from."""
    table = pq.read_table(out / "rows.parquet").to_pylist()
    return Counter(f"{Path(row['source']).name}:{row['row']}" for row in table)


def plan(out: Path) -> dict:
    return json.loads((out / "ledger.json").read_text())["plan"]


def test_the_ledger_plans_what_the_run_then_does(given: Path, tmp_path: Path) -> None:
    train_on = [
        {"path": f"{given}/many", "weight": 3},
        {"path": f"{given}/few.jsonl", "weight": 1, "epochs": 2},
    ]
    out = run(given, tmp_path / "run", "train.epochs=1", train=train_on)
    many, few = plan(out)["sources"]
    assert (many["documents"], few["documents"]) == (6, 2)
    assert few["passes"] == 2
    rows = seen(out)
    assert rows.total() == many["visits"] + few["visits"]
    assert sum(count for name, count in rows.items() if name.startswith("few")) == few["visits"]
    assert abs(few["visits"] / rows.total() - 0.25) <= 1 / rows.total()
    assert many["never_seen"] == few["never_seen"] == 0
    assert many["files"] == 2
    assert "passes" in (out / "report.html").read_text()


def test_epochs_of_a_source_and_the_stop_rule(given: Path, tmp_path: Path) -> None:
    few = {"path": f"{given}/few.jsonl", "epochs": 3}
    many = {"path": f"{given}/many/*.jsonl"}
    out = run(given, tmp_path / "epochs", "train.epochs=1", train=[many, few])
    assert sorted(seen(out).values()) == [1, 1, 1, 1, 1, 1, 3, 3]
    weighted = [{**many, "weight": 1}, {"path": f"{given}/few.jsonl", "weight": 1}]
    first = run(
        given, tmp_path / "first", "train.epochs=1", train=weighted, mix_stop="first_exhausted"
    )
    assert set(seen(first).values()) == {1}
    assert plan(first)["sources"][0]["never_seen"] >= 3
    by_tokens = run(given, tmp_path / "tokens", "train.epochs=1", train=weighted, mix_by="tokens")
    assert plan(by_tokens)["mix_by"] == "tokens"


def test_a_mixture_goes_on_to_the_bit(given: Path, tmp_path: Path) -> None:
    weighted = [
        {"path": f"{given}/many", "weight": 0.7},
        {"path": f"{given}/few.jsonl", "weight": 0.3},
    ]
    steps = ["train.steps=7", "checkpoint.every=3"]
    whole = run(given, tmp_path / "whole", *steps, train=weighted)
    again = run(given, tmp_path / "again", *steps, train=weighted)
    (again / "checkpoints" / "step-7").rename(tmp_path / "gone")
    resume(again, progress=False)
    assert seen(again) == seen(whole)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, again))
    assert all((one[name] == other[name]).all() for name in one)


def test_a_hub_data_set_is_pinned_to_its_commit(given: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def fetch(name: str, *, subset, split, revision) -> HubFiles:
        asked.append((name, subset, split, revision))
        return HubFiles("f" * 40, [(f"{name}/a.jsonl", given / "many" / "a.jsonl")])

    monkeypatch.setattr(import_module("tunesmith.build.sources"), "fetch", fetch)
    out = run(
        given,
        tmp_path / "run",
        "train.steps=1",
        train=[{"path": "someone/chats", "subset": "main", "split": "train"}],
        eval={"held": {"path": "someone/chats", "split": "test"}},
    )
    assert asked[0] == ("someone/chats", "main", "train", None)
    assert (out / "recipe.yaml").read_text().count("revision: " + "f" * 40) == 2
    assert plan(out)["sources"][0]["commit"] == "f" * 40
    assert {name.split(":")[0] for name in seen(out)} == {"a.jsonl"}
    resume(out, progress=False)
    assert asked[-1][-1] == "f" * 40


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": [{"path": "a", "weight": 1}, "b"]}, "b has no weight"),
        ({"train": ["a"], "mix_by": "tokens"}, "no source has a weight"),
        ({"train": ["a"], "mix_stop": "first_exhausted"}, "no source has a weight"),
        ({"train": [{"path": "a", "epochs": 2}, "a"]}, "twice"),
        ({"train": [{"path": "a", "weight": 0}]}, "above 0"),
        ({"train": ["a"], "eval": {"e": {"path": "a", "weight": 1}}}, "neither weight nor epochs"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(data: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train({"model": "M", "data": data}, progress=False)


def test_one_file_in_two_sources_of_a_mixture_is_refused(given: Path, tmp_path: Path) -> None:
    both = [{"path": f"{given}/many", "weight": 1}, {"path": f"{given}/many/a.jsonl", "weight": 1}]
    with pytest.raises(DataError, match="two sources") as caught:
        run(given, tmp_path / "run", train=both)
    assert caught.value.where.endswith("a.jsonl")


def test_what_is_for_the_hub_is_refused_for_files(given: Path, tmp_path: Path) -> None:
    for key in ("subset", "split", "revision"):
        with pytest.raises(InputError, match=f"{key} is for data sets of the hub"):
            run(given, tmp_path / "run", train=[{"path": f"{given}/few.jsonl", key: "x"}])


def test_the_limit_of_a_folder_is_that_of_all_its_files(given: Path, tmp_path: Path) -> None:
    limited = [{"path": f"{given}/many", "limit": 5}]
    out = run(given, tmp_path / "run", "train.epochs=1", train=limited)
    assert sorted(seen(out)) == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:0"]
