"""P3: the number of ranks changes speed only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl

STEPS = 6
COMMON = [
    f"train.steps={STEPS}",
    "model.dtype=float32",
    "optim.lr=0.003",
    "device.micro_tokens=96",
    "eval.every=3",
]
JOBS = {
    "full": ["batch.documents=6"],
    "lora": ["batch.documents=5", "adapter=lora", "adapter.rank=4"],
    "one": ["batch.documents=1", "device.share_prefixes=false", "device.cache=false"],
    "psft": ["batch.documents=4", "objective=psft", "objective.outer_steps=2"],
}
RANKS = (1, 2, 4)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    return run_all(tmp_path_factory.mktemp("ranks"), JOBS, COMMON)


def run_all(
    folder: Path, wanted: dict[str, list[str]], common: list[str]
) -> dict[tuple[str, int], Path]:
    inputs = {
        "model": str(tiny_folder(folder / "llama", num_hidden_layers=2)),
        "data": str(write_jsonl(folder / "rows.jsonl", chat_rows(14))),
        "eval": str(write_jsonl(folder / "eval.jsonl", chat_rows(19)[14:])),
    }
    groups, out = [], {}
    for ranks in RANKS:
        jobs = []
        for name, options in wanted.items():
            out[name, ranks] = folder / f"{name}-{ranks}"
            overrides = [*common, *options]
            jobs.append({**inputs, "out": str(out[name, ranks]), "overrides": overrides})
        groups.append((ranks, jobs))
    codes, _ = run_groups(groups)
    assert codes == [[0] * ranks for ranks in RANKS]
    return out


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("name", JOBS)
def test_losses_and_weights_are_those_of_one_rank(runs, name: str, ranks: int) -> None:
    assert_same_learning(runs[name, 1], runs[name, ranks], steps=STEPS)


def assert_same_learning(wanted: Path, found: Path, *, steps: int) -> None:
    assert len(losses(wanted)) == steps
    np.testing.assert_allclose(losses(found), losses(wanted), rtol=2e-5)
    assert losses(wanted)[-1] < losses(wanted)[0]
    one, many = weights(wanted), weights(found)
    assert set(one) == set(many)
    start = weights_change(one)
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=2e-4, atol=2e-5 * start)


def weights_change(tensors: dict[str, torch.Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


@pytest.mark.parametrize("name", JOBS)
def test_the_records_are_of_the_whole_step(runs, name: str) -> None:
    wanted = records(runs[name, 1], "train")
    for ranks in RANKS[1:]:
        for one, many in zip(wanted, records(runs[name, ranks], "train"), strict=True):
            for key in ("documents", "tokens", "target_tokens", "weight_sum", "epoch"):
                assert one[key] == many[key], key
            for key in ("grad_norm", "accuracy", "entropy", "logprob"):
                np.testing.assert_allclose(many[key], one[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", JOBS)
def test_evaluations_and_row_losses_are_those_of_one_rank(runs, name: str) -> None:
    for ranks in RANKS[1:]:
        one, many = runs[name, 1], runs[name, ranks]
        for a, b in zip(records(one, "eval"), records(many, "eval"), strict=True):
            assert (a["step"], a["rows"], a["target_tokens"]) == (
                b["step"], b["rows"], b["target_tokens"],
            )  # fmt: skip
            np.testing.assert_allclose(b["nll"], a["nll"], rtol=2e-5)
        first, second = (pq.read_table(run / "rows.parquet").to_pydict() for run in (one, many))
        for key in ("source", "row", "step", "weight"):
            assert first[key] == second[key]
        np.testing.assert_allclose(second["loss"], first["loss"], rtol=1e-4)


@pytest.mark.slow
def test_fifty_steps_are_those_of_one_rank(tmp_path: Path) -> None:
    common = [*COMMON, "train.steps=50", "optim.lr=0.001"]
    out = run_all(tmp_path, {name: JOBS[name] for name in ("full", "lora")}, common)
    for name in ("full", "lora"):
        for ranks in RANKS[1:]:
            assert_same_learning(out[name, 1], out[name, ranks], steps=50)
