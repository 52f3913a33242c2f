"""Packs and prefix groups in whole runs: what is learned, what is said, and resumes to the bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tiny import CORPUS, chat_rows, tiny_folder, write_jsonl
from tunesmith.build.build import build
from tunesmith.config.read import read_recipe
from tunesmith.errors import DataError, RecipeError
from tunesmith.estimate import forecast
from tunesmith.run import resume, train

BASE = [
    "checkpoint.every=null", "device.threads=1", "optim.lr=1e-2", "device.kind=cpu",
    "model.dtype=float32", "log.to=[]",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts of many lengths, and chats under a few system prompts."""
    folder = tmp_path_factory.mktemp("packed")
    tiny_folder(folder / "model", num_hidden_layers=1)
    write_jsonl(
        folder / "texts.jsonl",
        [{"text": " ".join(CORPUS[n % 6].split()[: 3 + n % 9] * (1 + n % 3))} for n in range(24)],
    )
    rows = []
    for number, row in enumerate(chat_rows(12) * 2):
        system = f"You are helper number {number % 4}. " + " ".join(CORPUS[number % 4].split()) * 2
        rows.append({"messages": [{"role": "system", "content": system}, *row["messages"][-2:]]})
    write_jsonl(folder / "chats.jsonl", rows)
    return folder


def recipe_of(place: Path, data: str = "texts.jsonl") -> dict:
    return {"model": str(place / "model"), "data": {"train": [str(place / data)]}}


def run(place: Path, out: Path, *overrides: str, data: str = "texts.jsonl") -> Path:
    train(recipe_of(place, data), out=out, overrides=[*BASE, *overrides], progress=False)
    return out


def records(out: Path) -> list[dict]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "train"]


def ledger(out: Path) -> dict:
    return json.loads((out / "ledger.json").read_text())


@pytest.mark.parametrize("kind", ["bfd", "bfd_split", "wrapped"])
def test_an_epoch_learns_each_target_that_is_left_once(
    place: Path, tmp_path: Path, kind: str
) -> None:
    out = run(
        place, tmp_path / kind, "train.epochs=2", "batch.documents=3", f"batch.packing={kind}",
        "batch.pack_tokens=40",
    )  # fmt: skip
    found, totals = records(out), ledger(out)["totals"]
    packing = ledger(out)["plan"]["packing"]
    assert packing["kind"] == kind
    tokens = sum(record["tokens"] for record in found) // 2
    assert packing["fill"] == pytest.approx(tokens / (40 * packing["packs"]), abs=1e-6)
    assert len(found) == 2 * -(-packing["packs"] // 3)
    assert sum(record["target_tokens"] for record in found) == 2 * totals["tokens_trained"]
    assert packing["rows_cut"] > 0
    assert (packing["tokens_lost"] > 0) == (kind == "bfd")
    assert all(record["tokens"] <= 3 * 40 for record in found)
    assert (out / "recipe.yaml").read_text().count(f"packing: {kind}") == 1


def test_a_stream_is_what_plain_transformers_computes(place: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = run(
        place, tmp_path / "run", "train.steps=1", "batch.documents=100", "batch.packing=wrapped",
        "batch.pack_tokens=64", "data.shuffle=false",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    texts = [json.loads(line)["text"] for line in (place / "texts.jsonl").read_text().splitlines()]
    stream = [i for text in texts for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    total = count = 0
    for at in range(0, len(stream), 64):
        ids = torch.tensor([stream[at : at + 64]])
        if ids.shape[1] > 1:
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    (record,) = records(out)
    assert record["target_tokens"] == count
    assert record["loss"] == pytest.approx(total / count, rel=1e-5)


def test_packs_of_whole_documents_learn_what_the_documents_say(place: Path, tmp_path: Path) -> None:
    """All documents in one step: packs change who meets whom, and here everybody meets."""
    whole = ["train.steps=1", "batch.documents=500"]
    plain = run(place, tmp_path / "plain", *whole)
    packed = run(place, tmp_path / "packed", *whole, "batch.packing=bfd", "batch.pack_tokens=400")
    (one,), (other,) = records(plain), records(packed)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert other["documents"] == one["documents"] == 24


@pytest.mark.parametrize(
    "options",
    [
        ["batch.packing=bfd", "batch.pack_tokens=60"],
        ["batch.packing=bfd_split", "batch.pack_tokens=30", "device.cache=false"],
        ["batch.packing=wrapped", "batch.pack_tokens=33"],
        ["batch.group_by_prefix=true"],
    ],
)
def test_runs_go_on_to_the_bit_in_the_middle_of_an_epoch(
    place: Path, tmp_path: Path, options: list[str]
) -> None:
    steps = ["batch.documents=3", "train.epochs=2", "checkpoint.every=2", "checkpoint.keep=9"]
    whole = run(place, tmp_path / "whole", *steps, *options)
    again = run(place, tmp_path / "again", *steps, *options)
    last = len(records(whole))
    assert last > 5
    for number in range(4, last + 1):
        saved = again / "checkpoints" / f"step-{number}"
        if saved.exists():
            saved.rename(tmp_path / f"gone-{number}")
    resume(again, progress=False)
    one, other = (load_file(out / "model" / "model.safetensors") for out in (whole, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    rows = [pq.read_table(out / "rows.parquet").to_pylist() for out in (whole, again)]
    assert rows[0] == rows[1]


def test_grouping_computes_less_and_learns_each_document_once_an_epoch(
    place: Path, tmp_path: Path
) -> None:
    size = ["train.epochs=2", "batch.documents=4"]
    plain = run(place, tmp_path / "plain", *size, data="chats.jsonl")
    grouped = run(
        place, tmp_path / "grouped", *size, "batch.group_by_prefix=true", data="chats.jsonl"
    )
    sums = [
        {
            name: sum(record[name] for record in records(out))
            for name in ("documents", "tokens", "target_tokens", "computed_tokens")
        }
        for out in (plain, grouped)
    ]
    computed = [one.pop("computed_tokens") for one in sums]
    assert sums[0] == sums[1]
    assert computed[1] < 0.8 * computed[0]
    for epoch in (1, 2):
        table = pq.read_table(grouped / "rows.parquet").to_pylist()
        assert Counter(row["row"] for row in table if row["epoch"] == epoch) == Counter(range(24))


def test_plan_says_what_grouping_would_save(place: Path, tmp_path: Path) -> None:
    from tunesmith.cli.plan import lines

    size = [*BASE, "train.epochs=2", "batch.documents=4"]
    found = forecast(read_recipe(recipe_of(place, "chats.jsonl"), size))
    grouped = run(
        place, tmp_path / "grouped", *size, "batch.group_by_prefix=true", data="chats.jsonl"
    )
    computed = sum(record["computed_tokens"] for record in records(grouped))
    assert found.work.grouped == computed < found.work.computed
    page = "\n".join(lines(found))
    assert f"batch.group_by_prefix=true would compute {computed:,} tokens" in page
    done = read_recipe(recipe_of(place, "chats.jsonl"), [*size, "batch.group_by_prefix=true"])
    assert forecast(done).work.grouped is None


def test_plan_and_start_name_the_packs(place: Path, tmp_path: Path) -> None:
    from tunesmith.cli.plan import lines

    options = ["batch.documents=3", "train.epochs=1", "batch.packing=bfd", "batch.pack_tokens=40"]
    recipe = read_recipe(recipe_of(place), [*BASE, *options])
    found = forecast(recipe)
    out = run(place, tmp_path / "run", *options)
    packing = ledger(out)["plan"]["packing"]
    assert found.packing == packing
    line = f"packing: bfd, 24 documents in {packing['packs']} packs of 40 tokens"
    assert any(one.startswith(line) and "targets lost" in one for one in lines(found))
    notes = build(recipe).choices.notes
    assert any(one.startswith(line) for one in notes)
    assert any("of 3 packs" in one for one in notes)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["batch.packing=bfd"], "needs the number of tokens per pack"),
        (["batch.pack_tokens=64"], "no effect without batch.packing"),
        (
            ["batch.packing=bfd", "batch.pack_tokens=64", "batch.group_by_prefix=true"],
            "each decide which documents are in a step",
        ),
        (
            ["batch.packing=bfd", "batch.pack_tokens=64", "data.too_long=split"],
            "batch.packing cuts long documents as well",
        ),
        (["batch.group_by_prefix=true", "data.shuffle=false"], "changes the order"),
        (["batch.packing=wrapped", "batch.pack_tokens=513"], "data.max_length is 512"),
    ],
)
def test_what_can_not_be_combined_is_refused(
    place: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(recipe_of(place), overrides=overrides, progress=False)


def test_mixtures_are_packed_where_no_document_is_cut(place: Path, tmp_path: Path) -> None:
    data = {
        "train": [
            {"path": str(place / "texts.jsonl"), "weight": 1},
            {"path": str(place / "chats.jsonl"), "weight": 1},
        ]
    }
    recipe = {"model": str(place / "model"), "data": data}
    packed = ["batch.documents=2", "train.epochs=1", "batch.pack_tokens=300"]
    train(recipe, out=tmp_path / "run", overrides=[*BASE, *packed, "batch.packing=bfd_split"],
          progress=False)  # fmt: skip
    seen = Counter(
        (Path(row["source"]).name, row["row"])
        for row in pq.read_table(tmp_path / "run" / "rows.parquet").to_pylist()
    )
    plan = ledger(tmp_path / "run")["plan"]
    assert seen.total() == sum(entry["visits"] for entry in plan["sources"])
    with pytest.raises(DataError, match="no place in a mixture"):
        train(
            recipe, out=tmp_path / "cut", progress=False,
            overrides=[*BASE, "batch.packing=bfd_split", "batch.pack_tokens=20"],
        )  # fmt: skip
    for overrides in (["batch.packing=wrapped", "batch.pack_tokens=64"],
                      ["batch.group_by_prefix=true"]):  # fmt: skip
        with pytest.raises(RecipeError, match="weights or epochs"):
            train(recipe, overrides=overrides, progress=False)
