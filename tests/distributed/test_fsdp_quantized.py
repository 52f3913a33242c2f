"""A base in 4 bits, spread over ranks, under a LoRA: learns what it learns on one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gang import losses, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl

pytestmark = pytest.mark.slow  # processes of several ranks

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

OPTIONS = [
    "train.steps=4",
    "model.quantization=nf4",
    "adapter=lora",
    "adapter.rank=4",
    "optim.lr=0.01",
    "batch.documents=4",
    "checkpoint.every=2",
]
SHARD = ["device.shard=full"]
NOTED = """
import json, os
from pathlib import Path
from tunesmith.build import build
from tunesmith.build.summary import quantized_share
share = build.parallelize

def noted(recipe, model, *args, **options):
    packed = [p.nbytes for p in model.parameters() if type(p).__name__ == "Params4bit"]
    before = quantized_share(model.base)
    found = share(recipe, model, *args, **options)
    own = [
        m.weight.to_local().nbytes for m in model.modules() if type(m).__name__ == "Sharded4bit"
    ]
    seen = [len(packed), sum(packed), len(own), sum(own), before, quantized_share(model.base)]
    (Path({place!r}) / ("rank-" + os.environ["RANK"])).write_text(json.dumps(seen))
    return found

build.parallelize = noted
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qlora")
    model = str(tiny_folder(folder / "model", num_hidden_layers=2))
    data = str(write_jsonl(folder / "rows.jsonl", chat_rows(10)))

    def job(name: str, *more: str, **extra):
        overrides = [*OPTIONS, *more]
        return {"model": model, "data": data, "out": str(folder / name), "overrides": overrides,
                **extra}  # fmt: skip

    wide, narrow = "model.dtype=float32", "model.dtype=bfloat16"
    noted = NOTED.format(place=str(folder))
    codes, _ = run_groups(
        [
            (1, [job("alone", wide), job("bf16-alone", narrow)]),
            (2, [job("two", wide, *SHARD, prelude=noted), job("bf16", narrow, *SHARD)]),
        ]
    )
    assert codes == [[0], [0, 0]]
    return folder


def test_packed_parts_learn_what_whole_ones_do(runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / "two"), losses(runs / "alone"), rtol=2e-5)
    assert losses(runs / "two")[-1] < losses(runs / "two")[0]
    one, many = weights(runs / "alone"), weights(runs / "two")
    assert set(one) == set(many)
    assert all("lora" in name for name in one)
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, rtol=2e-4, atol=2e-5)


def test_in_bfloat16_too(runs: Path) -> None:
    np.testing.assert_allclose(losses(runs / "bf16"), losses(runs / "bf16-alone"), rtol=2e-2)
    assert losses(runs / "bf16")[-1] < losses(runs / "bf16")[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_holds_half_of_the_packed_bytes(runs: Path, rank: int) -> None:
    maps, whole, spread, own, before, after = json.loads((runs / f"rank-{rank}").read_text())
    assert spread == maps > 0
    assert own == pytest.approx(whole / 2, rel=0.02)
    assert after == pytest.approx(before)
    assert before > 0.3
