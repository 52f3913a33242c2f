"""A model that will be spread is read in parts: no rank ever holds it whole, and it is the same
model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gang import losses, run_groups, weights
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.build import deferred_model
from tunesmith.config.read import read_recipe
from tunesmith.distributed.world import World
from tunesmith.model import deferred_load
from tunesmith.model.load import load_causal_lm
from tunesmith.model.source import resolve_model

WIDTH, LAYERS = 384, 12
OPTIONS = ["train.steps=2", "model.dtype=bfloat16", "optim.lr=0.01", "batch.documents=4",
           "device.shard=full", "checkpoint.every=null"]  # fmt: skip
MEASURED = """
import json, os, threading
from pathlib import Path
from tunesmith.build import build, deferred_model

WHOLE = {whole}
if WHOLE:
    deferred_model._needs_whole = lambda *_: "this test says so"

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

load, share = deferred_model.load_for_ranks, build.parallelize
seen = {{"peak": 0}}
ended = threading.Event()

def watch():
    while not ended.is_set():
        seen["peak"] = max(seen["peak"], anonymous())
        ended.wait(0.0005)

def loading(*args, **options):
    seen["before"] = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    ranked = load(*args, **options)
    seen["notes"] = list(ranked.loaded.notes)
    return ranked

def sharing(*args, **options):
    found = share(*args, **options)
    ended.set()
    seen["parts"] = sum(part.nbytes for part in found.parts.values())
    name = "rank-" + os.environ["RANK"] + "-" + str(WHOLE) + ".json"
    (Path({place!r}) / name).write_text(json.dumps(seen))
    return found

deferred_model.load_for_ranks, build.parallelize = loading, sharing
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unread")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS}
    tiny_folder(folder / "model", **sizes)
    write_jsonl(folder / "rows.jsonl", chat_rows(8))
    groups = []
    for name, whole in (("parts", False), ("whole", True)):
        prelude = MEASURED.format(whole=whole, place=str(folder))
        job = {
            "model": str(folder / "model"), "data": str(folder / "rows.jsonl"),
            "out": str(folder / name), "overrides": OPTIONS, "prelude": prelude,
        }  # fmt: skip
        groups.append((2, [job]))
    codes, _ = run_groups(groups)
    assert codes == [[0, 0], [0, 0]]
    return folder


def grown(folder: Path, rank: int, *, whole: bool) -> tuple[int, dict]:
    seen = json.loads((folder / f"rank-{rank}-{whole}.json").read_text())
    return seen["peak"] - seen["before"], seen


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_never_holds_more_than_its_part_and_few_layers(runs: Path, rank: int) -> None:
    size = (runs / "model" / "model.safetensors").stat().st_size  # in float32, as the parts are
    peak, seen = grown(runs, rank, whole=False)
    assert any("reads its own part" in note for note in seen["notes"])
    assert size / 2 * 0.95 < seen["parts"] < size / 2 * 1.05
    assert peak < seen["parts"] + 0.4 * size  # a few layers, and what testing the trial takes
    before, seen = grown(runs, rank, whole=True)
    assert any("loads the whole model" in note for note in seen["notes"])
    assert before > seen["parts"] + size


@pytest.mark.slow
def test_it_learns_the_same(runs: Path) -> None:
    assert losses(runs / "parts") == losses(runs / "whole")
    one, two = weights(runs / "parts"), weights(runs / "whole")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


NOTED = """
from tunesmith.build import deferred_model
load = deferred_model.load_for_ranks

def loading(*args, **options):
    ranked = load(*args, **options)
    notes = ranked.loaded.notes
    assert any("reads its own part" in note for note in notes), notes
    return ranked

deferred_model.load_for_ranks = loading
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_tied_heads_and_adapters_learn_what_one_process_does(tied: Path, adapter: str) -> None:
    alone, parts = tied / f"alone-{adapter}", tied / f"parts-{adapter}"
    assert losses(parts) == pytest.approx(losses(alone), rel=1e-6)
    one, two = weights(alone), weights(parts)
    assert one.keys() == two.keys()
    # an update is 3e-3 of a weight, whatever the size of its gradient, and rounding of that
    assert all(torch.allclose(one[name], two[name], rtol=0, atol=1e-5) for name in one)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process and two ranks, all parameters and a LoRA, of a model whose head is its
    embedding.
    """
    folder = tmp_path_factory.mktemp("tied")
    tiny_folder(folder / "model", "gemma2", num_hidden_layers=3, tie_word_embeddings=True)
    write_jsonl(folder / "rows.jsonl", chat_rows(10))
    options = ["train.steps=2", "model.dtype=float32", "optim.lr=0.003", "batch.documents=4"]

    def job(name: str, *more: str, prelude: str = "") -> dict:
        return {
            "model": str(folder / "model"), "data": str(folder / "rows.jsonl"),
            "out": str(folder / name), "overrides": [*options, *more], "prelude": prelude,
        }  # fmt: skip

    lora, full = ["adapter=lora", "adapter.rank=4"], "device.shard=full"
    alone = [job("alone-none"), job("alone-lora", *lora)]
    spread = [
        job("parts-none", full, prelude=NOTED), job("parts-lora", full, *lora, prelude=NOTED)
    ]  # fmt: skip
    codes, _ = run_groups([(1, alone), (2, spread)])
    assert codes == [[0], [0, 0]]
    return folder


CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "phi3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_put_together_are_the_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", family, num_hidden_layers=4)
    source = resolve_model(str(folder))
    trial = deferred_load.trial_model(source, dtype=dtype)
    assert trial is not None
    deferred = deferred_load.deferred_model(
        source, deferred_load.Traits("sdpa", unpacked=False), dtype=dtype
    )
    assert deferred_load.mismatch(deferred, trial) is None
    wanted = load_causal_lm(source, dtype=dtype).model
    files, model = deferred.unread, deferred.model
    assert files is not None
    for name, tensor in wanted.named_parameters():
        if tensor.ndim == 0:
            continue
        half = tensor.shape[0] // 2
        sizes = [(0, half), (half, tensor.shape[0] - half)]
        parts = [
            files.read_for(name, [at, *[0] * (tensor.ndim - 1)], [count, *tensor.shape[1:]])
            for at, count in sizes
        ]
        assert torch.equal(torch.cat(parts).to(dtype), tensor.detach())
    mine, theirs = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert {n: (p.shape, p.dtype) for n, p in mine.items()} == {
        n: (p.shape, p.dtype) for n, p in theirs.items()
    }
    held = sum(p.untyped_storage().nbytes() for p in mine.values())
    assert held <= 4 * len(mine)
    for name, buffer in wanted.named_buffers():
        assert torch.equal(dict(model.named_buffers())[name], buffer)
    assert model.base.generation_config.to_dict() == wanted.base.generation_config.to_dict()


def test_experts_that_are_fused_on_the_way_in_are_told(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "model", "mixtral", num_hidden_layers=4)))
    trial = deferred_load.trial_model(source, dtype=torch.float32)
    assert trial is not None
    deferred = deferred_load.deferred_model(
        source, deferred_load.Traits("sdpa", unpacked=False), dtype=torch.float32
    )
    assert "not in its files" in (deferred_load.mismatch(deferred, trial) or "")


def test_weights_that_are_changed_on_the_way_in_are_told(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "model", num_hidden_layers=4)))
    trial = deferred_load.trial_model(source, dtype=torch.float32)
    assert trial is not None
    deferred = deferred_load.deferred_model(
        source, deferred_load.Traits("sdpa", unpacked=False), dtype=torch.float32
    )
    layer = trial.decoder.layers[0]
    with torch.no_grad():
        layer.mlp.up_proj.weight[0, 0] += 1
    assert "up_proj.weight is changed" in (deferred_load.mismatch(deferred, trial) or "")
    deferred = deferred_load.deferred_model(
        source, deferred_load.Traits("sdpa", unpacked=False), dtype=torch.float32
    )
    with torch.no_grad():
        layer.mlp.up_proj.weight[0, 0] -= 1
        trial.decoder.rotary_emb.inv_freq[0] += 1
    assert "inv_freq is not made" in (deferred_load.mismatch(deferred, trial) or "")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["objective.kl=0.1"], "frozen copy"),
        (["adapter.continue_from=/elsewhere"], "goes on with an adapter"),
    ],
)
def test_what_needs_the_whole_model_is_named(overrides, reason: str, tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "model")))
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, ["device.shard=full", *overrides])

    class Plain:
        added = ()

    class Grown:
        added = ("token",)

    assert reason in (deferred_model._needs_whole(recipe, source, Plain) or "")  # pyright: ignore
    plain = read_recipe({"model": "M", "data": "D.jsonl"}, ["device.shard=full"])
    assert deferred_model._needs_whole(plain, source, Plain) is None  # pyright: ignore
    assert "adds rows" in (deferred_model._needs_whole(plain, source, Grown) or "")  # pyright: ignore
    assert "given in memory" in (deferred_model._needs_whole(plain, None, Plain) or "")  # pyright: ignore


def test_a_model_without_two_layers_alike_is_loaded_whole(tmp_path: Path) -> None:
    source = resolve_model(str(tiny_folder(tmp_path / "model", num_hidden_layers=1)))
    recipe = read_recipe({"model": "M", "data": "D.jsonl"}, ["model.dtype=float32"])
    assert "no two" in str(deferred_model._deferred(recipe, source, World(), CPU))


def test_a_fault_of_the_trial_is_told_as_of_the_model(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", num_hidden_layers=4)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = read_recipe(
        {"model": str(folder), "data": "D.jsonl"}, ["model.dtype=float32", "device.shard=full"]
    )
    found = deferred_model._deferred(recipe, resolve_model(str(folder)), World(), CPU)
    assert isinstance(found, deferred_model.RankModel)
    with pytest.raises(Exception, match="NaN"):
        deferred_model.test_loaded(found, World(), max_length=32)
