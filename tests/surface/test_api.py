"""`tunesmith.train` from Python: every way to hand over recipe, data and model, wherever it is
called.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tiny import chat_rows, tiny_folder, tiny_model, tiny_tokenizer, write_jsonl

SHORT: dict[str, Any] = {"train": {"steps": 2}, "batch": 4, "optim": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def train(folder: Path, out: Path, **more: Any) -> tunesmith.Run:
    return tunesmith.train(
        model={"name": str(folder), "dtype": "float32"}, out=out, progress=False,
        **{**SHORT, **more},
    )  # fmt: skip


def weights(run: tunesmith.Run) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in run.model.state_dict().items()}


def equal(one: tunesmith.Run, other: tunesmith.Run) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tunesmith.Run:
    """The run of the rows as a list, to which every other way of giving them must be equal."""
    return train(folder, tmp_path_factory.mktemp("reference") / "R", data=chat_rows())


def test_returns_what_was_done(reference: tunesmith.Run, folder: Path) -> None:
    assert reference.steps == 2
    assert reference.model_folder == reference.folder / "model"
    assert (reference.model_folder / "model.safetensors").exists()
    assert math.isfinite(reference.metrics["loss"])
    steps = [
        json.loads(line) for line in (reference.folder / "metrics.jsonl").read_text().splitlines()
    ]
    last = [entry for entry in steps if entry["kind"] == "train"][-1]
    assert reference.metrics["loss"] == pytest.approx(last["loss"])
    assert reference.tokenizer("Hello")["input_ids"]
    before = tiny_model().state_dict()
    after = weights(reference)
    assert any(not torch.equal(after[name], before[name]) for name in before)


def generator() -> Iterator[dict[str, Any]]:
    yield from chat_rows()


def dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(chat_rows())


def file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", chat_rows())


@pytest.mark.parametrize("way", ["generator", "tuple", "dataset", "path", "text", "paths"])
def test_data_in_every_form_trains_the_same(
    way: str, reference: tunesmith.Run, folder: Path, tmp_path: Path
) -> None:
    forms: dict[str, Any] = {
        "generator": generator,
        "tuple": lambda: tuple(chat_rows()),
        "dataset": dataset,
        "path": lambda: file(tmp_path),
        "text": lambda: str(file(tmp_path)),
        "paths": lambda: [file(tmp_path)],
    }
    assert equal(train(folder, tmp_path / "R", data=forms[way]()), reference)


def test_recipe_as_mapping_object_or_file(
    reference: tunesmith.Run, folder: Path, tmp_path: Path
) -> None:
    values = {**SHORT, "model": {"name": str(folder), "dtype": "float32"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(values))
    typed = tunesmith.read_recipe(values)
    assert isinstance(typed, tunesmith.Recipe)
    for number, form in enumerate((values, typed, recipe, str(recipe))):
        run = tunesmith.train(form, data=chat_rows(), out=tmp_path / f"R{number}", progress=False)
        assert equal(run, reference)


def test_keywords_go_over_the_recipe(folder: Path, tmp_path: Path) -> None:
    run = tunesmith.train(
        {"model": "elsewhere", "train": {"steps": 9}, "optim": {"lr": 1.0, "schedule": "linear"}},
        model=folder,
        data=chat_rows(),
        out=tmp_path / "R",
        optim={"lr": 1e-3},
        adapter="lora",
        overrides=["train.steps=1", "adapter.rank=4"],
        progress=False,
    )
    kept = tunesmith.read_recipe(run.folder / "recipe.yaml")
    assert (kept.optim.lr, kept.optim.schedule) == (1e-3, "linear")
    assert (kept.adapter.kind, kept.adapter.rank) == ("lora", 4)
    assert run.steps == 1
    assert type(run.model).__module__.startswith("peft")
    assert (run.model_folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "held_out",
    [chat_rows(3), "25%", 3, {"a": "rows.jsonl", "b": ["rows.jsonl"]}],
    ids=["rows", "share", "number", "sets"],
)
def test_held_out_data(
    held_out: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file(tmp_path)
    run = train(folder, tmp_path / "R", data=chat_rows(), eval=held_out)
    names = ["a", "b"] if isinstance(held_out, dict) else ["eval"]
    for name in names:
        assert math.isfinite(run.metrics[f"{name}/nll"])


@pytest.mark.any_dtype
def test_a_given_model_is_trained_and_handed_back_as_it_came(
    reference: tunesmith.Run, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(attention="sdpa")
    model.config.use_cache = False
    options = {**SHORT, "data": {"max_length": 512}}
    run = tunesmith.train(
        model=model, tokenizer=tiny_tokenizer(), out=tmp_path / "R", progress=False,
        **{**options, "data": chat_rows()},
    )  # fmt: skip
    assert run.model is model
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache is False
    assert not model.training
    assert equal(run, reference)
    plain = AutoModelForCausalLM.from_pretrained(run.model_folder)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]


def test_a_given_model_is_handed_back_after_a_refusal_too(tmp_path: Path) -> None:
    model = tiny_model(attention="sdpa")
    with pytest.raises(tunesmith.InputError, match=r"optim\.lr|adapter\.targets|match"):
        train_given(model, tmp_path, adapter={"kind": "lora", "targets": ["no_such_map"]})
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache
    assert not list(tmp_path.iterdir())


def train_given(model: Any, tmp_path: Path, **more: Any) -> tunesmith.Run:
    return tunesmith.train(
        model=model, tokenizer=tiny_tokenizer(), data=chat_rows(), out=tmp_path / "R",
        progress=False, **{**SHORT, **more},
    )  # fmt: skip


def test_a_given_model_needs_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(tunesmith.InputError, match="tokenizer"):
        tunesmith.train(model=tiny_model(), data=chat_rows(), out=tmp_path / "R", progress=False)
    assert not (tmp_path / "R").exists()


def test_off_the_main_thread(reference: tunesmith.Run, folder: Path, tmp_path: Path) -> None:
    runs: list[tunesmith.Run] = []
    worker = threading.Thread(
        target=lambda: runs.append(train(folder, tmp_path / "R", data=chat_rows()))
    )
    worker.start()
    worker.join()
    assert equal(runs[0], reference)


def test_inside_an_event_loop(reference: tunesmith.Run, folder: Path, tmp_path: Path) -> None:
    async def cell() -> tunesmith.Run:
        return train(folder, tmp_path / "R", data=chat_rows())

    assert equal(asyncio.run(cell()), reference)


def test_prints_nothing_unless_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(folder, tmp_path / "R", data=chat_rows())
    assert capsys.readouterr() == ("", "")


def test_leaves_the_callers_settings_alone(folder: Path, tmp_path: Path) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients, threads = torch.is_grad_enabled(), torch.get_num_threads()
    train(folder, tmp_path / "R", data=chat_rows())
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert (torch.is_grad_enabled(), torch.get_num_threads()) == (gradients, threads)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"data": []}, "no rows|none"),
        ({"data": [{"question": "1 + 1?"}]}, "question"),
        ({"data": [7]}, "<data>:0"),
        ({}, "no data"),
        ({"data": chat_rows(2), "optm": {"lr": 1}}, "optim"),
    ],
)
def test_wrong_calls_are_input_errors(
    arguments: dict[str, Any], said: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(tunesmith.InputError, match=said):
        train(folder, tmp_path / "R", **arguments)
    assert not (tmp_path / "R").exists()


def test_the_model_as_a_section(folder: Path, tmp_path: Path) -> None:
    section = {"name": str(folder), "dtype": "float32"}
    run = tunesmith.train(
        model=section, data=chat_rows(), out=tmp_path / "R", progress=False, **SHORT
    )
    assert next(run.model.parameters()).dtype == torch.float32
