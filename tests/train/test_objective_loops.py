"""A run under each objective is a plain loop of its formula: transformers, autograd on all logits
of one answer at a time, and `torch.optim.SGD`; its reports and evaluations are means of the same.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import formulas
import tunesmith
from tiny import tiny_folder, write_jsonl

pytestmark = pytest.mark.usefixtures("torch_settings")

STEPS, ROWS, RATE = 6, 2, 0.3
OPTIONS: dict[str, Any] = {
    "batch": ROWS,
    "optim": {
        "name": "sgd", "momentum": 0.0, "lr": RATE, "warmup": 0, "schedule": "constant",
        "max_grad_norm": None,
    },
    "checkpoint": {"every": None},
    "device": {"threads": 1, "micro_tokens": 64},
}  # fmt: skip
LORA = {"kind": "lora", "rank": 4, "alpha": 16}
Answer = tuple[torch.Tensor, int, torch.Tensor]
"""Ids of a prompt and its answer, where the answer begins, and the weights of its tokens."""
Formula = Callable[..., torch.Tensor]


def chats() -> list[dict[str, Any]]:
    """Two answers a row, with weights of their own; rows share how they begin."""
    system = {"role": "system", "content": "You add numbers and answer with the sum alone."}
    rows = []
    for i in range(5):
        turns = [system]
        for turn, weight in enumerate((0.5, 1.0 + i)):
            turns.append({"role": "user", "content": f"What is {i} plus {turn}?"})
            said = f"It is {i + turn}."
            turns.append({"role": "assistant", "content": said, "weight": weight})
        rows.append({"messages": turns})
    return rows


def answers(tokenizer: Any, row: dict[str, Any]) -> list[Answer]:
    """Each answer after what inference sends for it."""
    found = []
    for at, message in enumerate(row["messages"]):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            row["messages"][:at], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        said = tokenizer(message["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        weights = torch.full((len(said),), message["weight"])
        found.append((torch.tensor(ids + said), len(ids), weights))
    return found


def weighted_ids(tokenizer: Any, row: dict[str, Any]) -> dict[str, list[Any]]:
    """A row of ids, each with a weight of its own, some of them 0."""
    ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
    weights = [(0.0, 0.5, 2.0, 0.25)[(place + token) % 4] for place, token in enumerate(ids)]
    stop = max(place for place, token in enumerate(ids) if token == tokenizer.eos_token_id)
    return {"input_ids": ids[: stop + 1], "weights": [*weights[:stop], 1.5]}


@dataclass
class Case:
    """An objective of the recipe and its formula; `outer`: steps for which an old policy stands."""

    objective: dict[str, Any]
    formula: Formula
    outer: int = 0
    warmup: int = 0  # steps of nll before it
    lora: bool = False
    stats: Callable[..., dict[str, torch.Tensor]] = field(default=lambda **_: {})


def kl_only(log_p: torch.Tensor, y: torch.Tensor, *, log_q: torch.Tensor, **_: Any) -> torch.Tensor:
    return formulas.nll(log_p, y) + 0.5 * formulas.kl(log_p, log_q)


def psft_tight(log_p: torch.Tensor, y: torch.Tensor, **more: Any) -> torch.Tensor:
    return formulas.psft(log_p, y, high=0.05, old=more["old"])


def of_kl(*, log_p: torch.Tensor, log_q: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
    return {"kl": formulas.kl(log_p, log_q)}


def of_psft(*, log_p: torch.Tensor, y: torch.Tensor, old: torch.Tensor, **_: Any):
    ratio = (-formulas.nll(log_p, y) - old).exp()
    return {"clipped": (ratio > 1.05).float(), "fallen": (ratio < 0.8).float()}


def of_dft(*, log_p: torch.Tensor, y: torch.Tensor, **_: Any) -> dict[str, torch.Tensor]:
    return {"mean_weight": (-formulas.nll(log_p, y)).exp()}


CASES: dict[str, Case] = {
    "nll": Case({"name": "nll"}, formulas.nll),
    "smoothed": Case({"name": "nll", "label_smoothing": 0.1}, formulas.smoothed),
    "z-loss": Case({"name": "nll", "z_loss": 0.01}, formulas.with_z),
    "entropy": Case({"name": "nll", "entropy": 0.1}, formulas.with_entropy),
    "dft": Case({"name": "dft"}, formulas.dft, stats=of_dft),
    "eaft": Case({"name": "eaft"}, formulas.eaft),
    "psft": Case(
        {"name": "psft", "outer_steps": 3, "eps_high": 0.05}, psft_tight, outer=3, stats=of_psft
    ),
    "psft after nll": Case(
        {"name": "psft", "outer_steps": 2, "eps_high": 0.05, "warmup_epochs": 1},
        psft_tight, outer=2, warmup=2,
    ),
    "asft": Case({"name": "asft"}, formulas.asft, stats=of_kl),
    "kl": Case({"name": "nll", "kl": 0.5}, kl_only, stats=of_kl),
    "lora kl": Case({"name": "nll", "kl": 0.5}, kl_only, lora=True, stats=of_kl),
    "lora asft": Case({"name": "asft"}, formulas.asft, lora=True, stats=of_kl),
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("given")
    tiny_folder(place / "model", num_hidden_layers=2)
    write_jsonl(place / "rows.jsonl", chats()[:4])
    write_jsonl(place / "held.jsonl", chats()[4:])
    return place


def run(given: Path, out: Path, case: Case, **more: Any) -> tunesmith.Run:
    recipe = {
        "model": {"name": str(given / "model"), "dtype": "float32"},
        "data": {"train": str(given / "rows.jsonl"), "shuffle": False},
        "objective": case.objective,
        "adapter": LORA if case.lora else "none",
        "train": {"steps": STEPS},
        **OPTIONS,
        **more,
    }
    return tunesmith.train(recipe, eval=str(given / "held.jsonl"), out=out, progress=False)


def records(run: tunesmith.Run, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def beginning(given: Path, folder: Path, case: Case) -> Any:
    """The model before the first step; its LoRA is that of a run that has hardly moved."""
    model = AutoModelForCausalLM.from_pretrained(given / "model", dtype=torch.float32)
    model.set_attn_implementation("eager")
    if not case.lora:
        return model
    slow = {**OPTIONS["optim"], "lr": 1e-30}
    still = run(given, folder, case, optim=slow, train={"steps": 1})
    return PeftModel.from_pretrained(model, str(still.model_folder), is_trainable=True)


def logits(model: Any, ids: torch.Tensor, start: int) -> torch.Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]


class Loop:
    """The plain loop: what each step loses and reports, and the model it leaves."""

    def __init__(self, model: Any, case: Case, rows: list[list[Answer]]) -> None:
        self.model, self.case, self.rows = model.train(), case, rows
        self.base = None if case.lora else copy.deepcopy(model)
        self.old = copy.deepcopy(model)
        self.steps: list[dict[str, float]] = []
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=RATE)
        for step in range(STEPS):
            since = step - case.warmup
            if case.outer and since >= 0 and since % case.outer == 0:
                self.old.load_state_dict(model.state_dict())
            optimizer.zero_grad()
            first = step * ROWS % len(rows)
            self.take(step, [one for row in rows[first : first + ROWS] for one in row])
            optimizer.step()

    def take(self, step: int, taken: list[Answer]) -> None:
        """One step's gradients, and the means of what it reports."""
        warming = bool(self.case.warmup) and step < self.case.warmup
        formula = formulas.nll if warming else self.case.formula
        total = sum(float(weight.sum()) for _, _, weight in taken)
        sums: dict[str, float] = {}
        for ids, start, weight in taken:
            whole, y = logits(self.model, ids, start), ids[start:]
            sides = {"y": y, "log_p": whole.log_softmax(-1), **self.sides(ids, start, y)}
            losses = formula(logits=whole, **sides)
            ((weight * losses).sum() / total).backward()
            log_p = sides["log_p"].detach()
            values = {
                "loss": losses,
                "logprob": -formulas.nll(log_p, y),
                "accuracy": (log_p.argmax(-1) == y).float(),
                "entropy": -(log_p.exp() * log_p).sum(-1),
                **({} if warming else self.case.stats(**{**sides, "log_p": log_p})),
            }
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float((weight * value.detach()).sum()) / total
        self.steps.append(sums)

    @torch.no_grad()
    def sides(self, ids: torch.Tensor, start: int, y: torch.Tensor) -> dict[str, torch.Tensor]:
        old = logits(self.old, ids, start).log_softmax(-1)
        if self.base is None:
            with self.model.disable_adapter():
                base = logits(self.model, ids, start)
        else:
            base = logits(self.base, ids, start)
        return {"old": -formulas.nll(old, y), "log_q": base.log_softmax(-1)}


@torch.no_grad()
def held_out(model: Any, rows: list[list[Answer]]) -> float:
    taken = [one for row in rows for one in row]
    total = sum(float(weight.sum()) for _, _, weight in taken)
    losses = (
        weight * formulas.nll(logits(model, ids, start).log_softmax(-1), ids[start:])
        for ids, start, weight in taken
    )
    return float(sum(one.sum() for one in losses)) / total


def check(case: Case, data: Path, given: Path, rows: list[list[Answer]], out: Path) -> None:
    """The run over the file `data` and the loop over `rows`, the same answers; those of the last
    row are held out.
    """
    done = run(given, out, case, data={"train": str(data), "shuffle": False})
    model = beginning(given, out.with_name("still"), case)
    before, first = held_out(model, rows[4:]), copy.deepcopy(model.state_dict())
    loop = Loop(model, case, rows[:4])

    found = records(done, "train")
    assert len(found) == STEPS
    for step, (record, wanted) in enumerate(zip(found, loop.steps, strict=True)):
        for key, value in wanted.items():
            assert record[key] == pytest.approx(value, rel=1e-4, abs=1e-5), (step, key)
    if case.outer and not case.warmup:
        assert max(step["clipped"] for step in loop.steps) > 0, "the clip was never felt"
    evals = records(done, "eval")
    for record, value in ((evals[0], before), (evals[-1], held_out(model, rows[4:]))):
        assert record["nll"] == pytest.approx(value, rel=1e-4)
        assert record["perplexity"] == pytest.approx(math.exp(value), rel=1e-4)
    theirs = dict(done.model.named_parameters())
    moved = 0.0
    for key, parameter in model.named_parameters():
        change = parameter.detach() - first[key]
        apart = theirs[key].detach() - parameter.detach()
        assert apart.norm() <= 1e-3 * change.norm() + 1e-6, key
        moved = max(moved, float(change.norm()))
    assert moved > 2e-3


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_plain_loop_of_its_formula(name: str, given: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    rows = [answers(tokenizer, row) for row in chats()]
    check(CASES[name], given / "rows.jsonl", given, rows, tmp_path / "R")


@pytest.mark.parametrize("name", ["nll", "eaft", "psft", "asft"])
def test_tokens_may_have_weights_under_any_objective(
    name: str, given: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(given / "model")
    made = [weighted_ids(tokenizer, row) for row in chats()[:4]]
    data = write_jsonl(tmp_path / "ids.jsonl", made)
    rows = [[(torch.tensor(row["input_ids"]), 1, torch.tensor(row["weights"][1:]))] for row in made]
    rows.append(answers(tokenizer, chats()[4]))
    check(CASES[name], data, given, rows, tmp_path / "R")
