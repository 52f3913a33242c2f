"""Every key of the recipe that steers data, batches, optimizer and device shows in what a run
leaves behind.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from tiny import CHATML, chat_rows, difference, write_jsonl
from tunesmith.errors import DataError
from tunesmith.optim.schedules import SHAPES
from tunesmith.run import train

pytestmark = pytest.mark.usefixtures("torch_settings")

BASE = [
    "batch.documents=4", "train.steps=3", "checkpoint.every=null", "device.threads=1",
    "optim.lr=1e-2", "model.dtype=float32",
]  # fmt: skip


@dataclass
class Left:
    """A finished run, read back from its folder."""

    folder: Path

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def records(self, kind: str = "train") -> list[dict]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if record["kind"] == kind]

    def column(self, name: str) -> list:
        return [record[name] for record in self.records()]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "model" / "model.safetensors")

    @property
    def rows(self) -> list[int]:
        return pq.read_table(self.folder / "rows.parquet").column("row").to_pylist()

    @property
    def totals(self) -> dict[str, int]:
        return self.json("ledger.json")["totals"]

    @property
    def machine(self) -> dict:
        return self.json("machine.json")


@pytest.fixture
def start(eight_chats: Path, tmp_path: Path) -> Callable[..., Left]:
    def run(*overrides: str, data: Any = None, **sections: Any) -> Left:
        out = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
        if data is None and not any(o.startswith("data.train=") for o in overrides):
            data = str(eight_chats / "rows.jsonl")
        asked = [*BASE, *overrides]
        train(
            model=str(eight_chats / "model"), data=data, out=out, overrides=asked, progress=False,
            **sections,
        )  # fmt: skip
        return Left(out)

    return run


@pytest.fixture(scope="module")
def plain(eight_chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Left:
    """The run that the others are compared with."""
    out = tmp_path_factory.mktemp("plain") / "run"
    model, data = str(eight_chats / "model"), str(eight_chats / "rows.jsonl")
    train(model=model, data=data, out=out, overrides=BASE, progress=False)
    return Left(out)


def test_the_same_options_give_the_same_weights(start, plain: Left) -> None:
    assert difference(start(), plain) == 0


@pytest.mark.parametrize(
    "override",
    [
        "optim.lr=2e-2",
        "optim.betas=[0.5, 0.999]",
        "optim.betas=[0.9, 0.5]",
        "optim.eps=1e-3",
        "optim.weight_decay=0.5",
        "optim.max_grad_norm=0.1",
        "optim.max_grad_norm=null",
        "optim.warmup=2",
        "optim.schedule=constant",
        "train.seed=7",
        "data.shuffle=false",
        pytest.param("model.dtype=bfloat16", marks=pytest.mark.any_dtype),
    ],
)
def test_what_changes_learning_changes_the_weights(start, plain: Left, override: str) -> None:
    assert difference(start(override), plain) > 1e-5


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_learning_rate_follows_the_schedule_after_its_warmup(start, name: str) -> None:
    progress = [0, 1 / 3, 2 / 3]
    shapes = {
        "cosine": [1, 0.75, 0.25],
        "linear": [1, 2 / 3, 1 / 3],
        "constant": [1, 1, 1],
        "exponential": [10**-x for x in progress],
        "quarter_cosine": [1, 3**0.5 / 2, 0.5],
    }
    run = start(f"optim.schedule={name}", "optim.warmup=1", "train.steps=4")
    assert run.column("lr") == pytest.approx([0.005, *(0.01 * share for share in shapes[name])])


@pytest.mark.parametrize(("warmup", "first"), [("0", 0.01), ("0.5", 0.01 / 3), ("3", 0.01 / 4)])
def test_warmup_is_a_share_of_the_steps_or_a_number_of_them(start, warmup, first) -> None:
    run = start(f"optim.warmup={warmup}", "optim.schedule=constant", "train.steps=4")
    assert run.column("lr")[0] == pytest.approx(first)


def test_weight_decay_spares_norms_and_embeddings(start, plain: Left) -> None:
    before = plain.weights
    after = start("optim.weight_decay=0.5", "train.steps=1", "optim.warmup=0").weights
    without = start("train.steps=1", "optim.warmup=0").weights
    for name in before:
        spared = "norm" in name or "embed" in name
        assert torch.equal(after[name], without[name]) == spared, name


def test_the_seed_sets_the_order_and_no_shuffle_is_the_datas_order(start, plain: Left) -> None:
    assert start("train.seed=7").rows != plain.rows
    ordered = start("data.shuffle=false", "train.seed=7", "train.steps=3").rows
    assert ordered == [*range(8), *range(4)]


def test_a_step_is_as_many_documents_or_tokens_as_asked(start, plain: Left) -> None:
    assert plain.column("documents") == [4, 4, 4]
    assert start("batch.documents=3").column("documents") == [3, 3, 2]
    run = start("batch.documents=null", "batch.tokens=150", "data.shuffle=false", "train.steps=2")
    lengths = pq.read_table(run.folder / "rows.parquet").column("tokens").to_pylist()
    count = run.column("documents")[0]
    assert sum(lengths[: count - 1]) < 150 <= sum(lengths[:count]) == run.column("tokens")[0]


@pytest.mark.parametrize(
    ("length", "steps"), [({"steps": 1}, 1), ({"epochs": 2}, 4), ({"epochs": 0.5}, 1)]
)
def test_length_in_steps_or_epochs(
    eight_chats: Path, tmp_path: Path, length: dict, steps: int
) -> None:
    names = {"model": str(eight_chats / "model"), "data": str(eight_chats / "rows.jsonl")}
    sections: dict[str, Any] = {"batch": 4, "device": {"threads": 1}, "train": length}
    run = train(**names, out=tmp_path / "run", progress=False, **sections)
    assert run.steps == steps == len(Left(run.folder).records())


def test_train_on_chooses_the_targets(start, plain: Left) -> None:
    def targets(value: str) -> int:
        return start(f"data.train_on={value}", "train.steps=1").totals["tokens_trained"]

    auto, everything = plain.totals["tokens_trained"], targets("all")
    assert targets("assistant") == auto
    assert targets("last") < auto < everything <= plain.totals["tokens"]
    assert targets("[user]") not in (auto, everything)
    assert auto < targets("[user, assistant]") < everything


def test_train_on_completion_leaves_the_answers_of_the_prompt(start, tmp_path: Path) -> None:
    rows = [
        {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
        for row in chat_rows(6)[2::3]
    ]
    data = str(write_jsonl(tmp_path / "pairs.jsonl", rows))
    few, many = (
        start(f"data.train_on={value}", "train.steps=1", data=data).totals["tokens_trained"]
        for value in ("completion", "assistant")
    )
    assert few < many


def test_over_long_rows(start, plain: Left) -> None:
    tokens = plain.totals["tokens"]
    limit = "data.max_length=60"
    with pytest.raises(DataError, match="too-long"):
        start(limit)
    dropped, truncated = (
        start(limit, f"data.too_long={way}", "train.steps=1") for way in ("drop", "truncate")
    )
    assert dropped.totals["rows_dropped"] > 0 == dropped.totals["rows_truncated"]
    assert truncated.totals["rows_truncated"] == dropped.totals["rows_dropped"]
    assert truncated.totals["tokens_truncated"] > 0
    assert {run.totals["tokens"] for run in (dropped, truncated)} == {tokens}
    assert plain.machine["chosen"]["max_length"] == 512
    assert dropped.machine["chosen"]["max_length"] == 60


def test_long_texts_are_cut_or_continued(start, tmp_path: Path) -> None:
    texts = [{"text": "the red house stands on a small green hill " * 8} for _ in range(4)]
    data = str(write_jsonl(tmp_path / "texts.jsonl", texts))
    truncated, split = (
        start("data.max_length=20", f"data.too_long={way}", "train.steps=1", data=data).totals
        for way in ("truncate", "split")
    )
    assert truncated["tokens_truncated"] > 0 == split["tokens_truncated"]
    assert split["tokens_trained"] > truncated["tokens_trained"]


def test_bad_rows_are_refused_or_dropped(start, tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "some.jsonl", [*chat_rows(5), {"messages": "none"}]))
    with pytest.raises(DataError, match="1 of 6 rows"):
        start(data=data)
    totals = start("data.bad_rows=drop", "train.steps=1", data=data).totals
    assert (totals["rows"], totals["rows_trained"], totals["rows_dropped"]) == (6, 5, 1)


def test_the_template_and_its_arguments_show_in_what_is_read(start, tmp_path: Path) -> None:
    loud = tmp_path / "loud.jinja"
    loud.write_text("{{ 'LOUD ' * (loudness | default(0)) }}" + CHATML)
    data = str(write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}]))

    def seen(*overrides: str) -> str:
        return start(*overrides, "train.steps=1", data=data).machine["rendered_row"]

    own = seen()
    assert own.startswith("<|im_start|>user\n1 + 1 =<|im_end|>")
    assert "im_start" not in seen("data.template=none")
    assert seen(f"data.template={loud}") == own
    asked = (f"data.template={loud}", "data.template_kwargs={loudness: 2}")
    assert seen(*asked) == "LOUD LOUD " + own


def test_each_source_has_its_own_limit_columns_and_format(
    start, eight_chats, tmp_path: Path
) -> None:
    asked = [{"question": f"{i} + 1?", "reply": str(i + 1)} for i in range(4)]
    both = [{"text": "a b c d", **row} for row in chat_rows(3)]
    one = str(write_jsonl(tmp_path / "asked.jsonl", asked))
    two = str(write_jsonl(tmp_path / "both.jsonl", both))
    chats = str(eight_chats / "rows.jsonl")
    sources = [
        {"path": one, "columns": {"prompt": "question", "completion": "reply"}},
        {"path": two, "format": "text"},
        {"path": chats, "limit": 2},
    ]
    counts = start("train.steps=1", f"data.train={json.dumps(sources)}").json("ledger.json")
    found = counts["sources"]
    assert {name: found[name]["rows_trained"] for name in found} == {one: 4, two: 3, chats: 2}
    sources[1]["format"] = "messages"
    chat = start("train.steps=1", f"data.train={json.dumps(sources)}").json("ledger.json")
    chat = chat["sources"]
    assert chat[two]["tokens"] > found[two]["tokens"]


@pytest.mark.parametrize(
    ("override", "chosen", "computes"),
    [
        ("device.micro_tokens=48", ("micro_tokens", 48), "more"),
        ("device.share_prefixes=false", ("share_prefixes", False), "more"),
        ("device.share_prefixes=true", ("share_prefixes", True), "same"),
        ("device.gradient_checkpointing=true", ("gradient_checkpointing", "layers"), "same"),
        ("device.gradient_checkpointing=2", ("gradient_checkpointing", 2), "same"),
        (
            "device.gradient_checkpointing=selective",
            ("gradient_checkpointing", "selective"),
            "same",
        ),
        ("device.attention=unpacked", ("attention", "unpacked"), "more"),
        ("device.attention=sdpa", ("attention", "sdpa"), "same"),
    ],
)
def test_device_changes_the_work_and_not_the_weights(
    start, plain: Left, override: str, chosen: tuple[str, Any], computes: str
) -> None:
    run = start(override)
    assert run.machine["chosen"][chosen[0]] == chosen[1]
    assert difference(run, plain) < 1e-5
    assert run.column("tokens") == plain.column("tokens")
    work, usual = sum(run.column("computed_tokens")), sum(plain.column("computed_tokens"))
    assert work > usual if computes == "more" else work == usual


def test_recomputing_activations_is_off_unless_needed(plain: Left) -> None:
    assert plain.machine["chosen"]["gradient_checkpointing"] == "none"


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_set(start, threads: int) -> None:
    run = start(f"device.threads={threads}", "train.steps=1")
    assert run.machine["threads"] == torch.get_num_threads() == threads


@pytest.mark.parametrize("wanted", [True, False])
def test_determinism_can_be_let_go(start, wanted: bool) -> None:
    torch.use_deterministic_algorithms(not wanted)
    start(f"device.deterministic={str(wanted).lower()}", "train.steps=1")
    assert torch.are_deterministic_algorithms_enabled() is wanted
