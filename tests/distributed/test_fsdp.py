"""Spread over ranks, a model learns what it learns on one; its checkpoints fit any number."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from gang import losses, records, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.checkpoint.folder import find_damage
from tunesmith.checkpoint.sharded import load_parts
from tunesmith.model.load import load_causal_lm
from tunesmith.model.source import resolve_model
from tunesmith.optim import AdamW

STEPS = 6
COMMON = [
    f"train.steps={STEPS}",
    "model.dtype=float32",
    "optim.lr=0.003",
    "device.micro_tokens=96",
    "batch.documents=6",
]
LORA = ["adapter=lora", "adapter.rank=4"]
LAYERS = ["device.gradient_checkpointing=layers"]
SHARD = ["device.shard=full"]
CASES = {
    "full": (2, "plain", []),
    "uneven": (3, "plain", LAYERS),
    "tied": (2, "tied", ["optim=sgd", "batch.documents=1"]),
    "lora": (2, "tied", LORA),
    "hybrid": (4, "plain", []),
}
BFLOAT16 = ["model.dtype=bfloat16", "optim.lr=0.001"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("shards")
    models = {
        "plain": str(tiny_folder(folder / "model-plain", num_hidden_layers=2, vocab_size=449)),
        "tied": str(
            tiny_folder(
                folder / "model-tied", "gemma2", num_hidden_layers=2, tie_word_embeddings=True
            )
        ),
    }
    data = str(write_jsonl(folder / "rows.jsonl", chat_rows(14)))
    held_out = str(write_jsonl(folder / "eval.jsonl", chat_rows(19)[14:]))

    def job(name: str, model: str, options: list[str], **more):
        inputs = {"model": models[model], "data": data, "eval": held_out}
        return {**inputs, "out": str(folder / name), "overrides": [*COMMON, *options], **more}

    alone = [job(f"{name}-alone", model, rest) for name, (_, model, rest) in CASES.items()]
    alone.append(job("bf16-alone", "tied", BFLOAT16))
    groups = [(1, alone)]
    for name, (ranks, model, rest) in CASES.items():
        shard = ["device.shard=hybrid"] if name == "hybrid" else SHARD
        groups.append((ranks, [job(name, model, [*rest, *shard])]))
    for name in ("halted-1", "halted-4"):
        stopped = job(name, "plain", SHARD, signal_after=[1, 3, signal.SIGTERM])
        groups.append((2, [stopped]))
    none = ["device.shard=none"]
    groups.append((1, [{"call": "resume", "out": str(folder / "halted-1"), "overrides": none}]))
    groups.append((4, [{"call": "resume", "out": str(folder / "halted-4"), "overrides": []}]))
    groups.append((2, [job("bf16", "tied", [*BFLOAT16, *SHARD])]))
    groups.append((2, [job("lost", "plain", SHARD, signal_after=[1, 3, signal.SIGKILL])]))
    groups.append((2, [job("refused", "plain", [*SHARD, "optim=muon"])]))
    codes, said = run_groups(groups, machine=2)
    assert codes == [[0]] + [[0] * case[0] for case in CASES.values()] + [
        [143, 143], [143, 143], [0], [0] * 4, [0, 0], [1, -signal.SIGKILL], [2, 2],
    ]  # fmt: skip
    return folder, said


def assert_same_learning(wanted: Path, found: Path) -> None:
    assert [r["step"] for r in records(found, "train")] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(found), losses(wanted), rtol=2e-5)
    norms = [[r["grad_norm"] for r in records(run, "train")] for run in (wanted, found)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=2e-4)
    for a, b in zip(records(wanted, "eval"), records(found, "eval"), strict=True):
        np.testing.assert_allclose(b["nll"], a["nll"], rtol=2e-5)
    one, many = weights(wanted), weights(found)
    assert set(one) == set(many)
    for key, tensor in one.items():
        assert many[key].dtype == tensor.dtype
        torch.testing.assert_close(many[key], tensor, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_spread_weights_learn_what_whole_ones_do(runs, name: str) -> None:
    folder, _ = runs
    assert_same_learning(folder / f"{name}-alone", folder / name)


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_checkpoint_of_two_ranks_goes_on_with_another_number(runs, ranks: int) -> None:
    folder, _ = runs
    run = folder / f"halted-{ranks}"
    first = run / "checkpoints" / "step-3" / "parts"
    assert len(list(first.glob("*.distcp"))) == 2
    assert_same_learning(folder / "full-alone", run)


def test_a_damaged_part_is_found(runs, tmp_path: Path) -> None:
    folder, _ = runs
    copy = shutil.copytree(folder / "halted-4" / "checkpoints" / "step-3", tmp_path / "step-3")
    assert find_damage(copy) is None
    part = next((copy / "parts").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    assert part.name in (find_damage(copy) or "")


def test_bfloat16_is_gathered_and_float32_is_kept(runs) -> None:
    folder, _ = runs
    one, many = folder / "bf16-alone", folder / "bf16"
    np.testing.assert_allclose(losses(many), losses(one), rtol=2e-2)
    assert losses(many)[-1] < losses(many)[0]
    first, second = weights(one), weights(many)
    assert set(first) == set(second)
    for key, tensor in first.items():
        assert second[key].dtype == tensor.dtype == torch.bfloat16
        torch.testing.assert_close(second[key].float(), tensor.float(), rtol=0.05, atol=0.01)


def test_masters_of_shards_load_into_either_form(runs) -> None:
    """To the bit, in one process: bfloat16 weights with their lower halves, or float32 ones."""
    folder, _ = runs
    saved = max((folder / "bf16" / "checkpoints").glob("step-*"), key=lambda p: p.name)
    states, models = [], []
    for dtype in ("bfloat16", "float32"):
        models.append(load_causal_lm(resolve_model(str(folder / "model-tied")), dtype=dtype).model)
        optimizer = AdamW(models[-1].named_parameters())
        load_parts(saved / "parts", optimizer, None)
        states.append(optimizer.state_dict())
    split, full = states
    assert split.keys() == full.keys()
    assert all(torch.equal(split[name], full[name]) for name in full)
    masters = [tensor for name, tensor in full.items() if name.startswith("master.")]
    assert not any(torch.equal(master, master.bfloat16().float()) for master in masters)
    exported = weights(folder / "bf16")
    for name, parameter in models[0].base.named_parameters():
        torch.testing.assert_close(parameter.detach(), exported[name], rtol=2**-7, atol=0)


def test_the_loss_of_a_rank_inside_a_step_is_named(runs) -> None:
    _, said = runs
    assert "rank 0: rank 1 of 2 ended or can't be reached" in said


def test_what_needs_whole_weights_is_refused(runs) -> None:
    folder, said = runs
    assert said.count("muon looks at whole weights") == 1
    assert "optim.name=adamw" in said
    assert not (folder / "refused").exists()
