"""Every kind of adapter trains, goes on to the bit, and is exported as plain peft loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tunesmith
from tiny import chat_rows, tiny_folder, write_jsonl
from tunesmith.cli.app import run as command
from tunesmith.errors import InputError

KINDS = (
    "lora", "rslora", "dora", "pissa", "olora", "vera", "oft", "boft", "ia3", "loha", "lokr",
    "hra", "miss",
)  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
QUICK = ("lora", "dora", "pissa", "vera")
"""Kinds that are resumed in every test run; the others in the longer one."""
ON_EXPERTS = ("lora", "rslora")
SIZES = {"rank": 4, "alpha": 8}
WITHOUT_ALPHA = ("vera", "hra", "miss")
IDS = torch.tensor([[5, 17, 40, 200, 33, 91, 7, 300, 12, 64, 8, 9, 10]])


def section(kind: str, family: str = "llama", **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": kind, **more}
    if kind in ("oft", "boft"):
        found["rotation_size"] = 4
    elif kind in WITHOUT_ALPHA:
        found["rank"] = 4
    elif kind != "ia3":
        found |= SIZES
    if family == "qwen3_moe" and kind not in ON_EXPERTS:
        found["targets"] = ATTENTION
    return found


def train(
    base: Path,
    out: Path,
    adapter: dict[str, Any],
    *,
    data: Path | None = None,
    progress: bool = False,
    **more: Any,
) -> tunesmith.Run:
    options = {
        "model": {"name": str(base), "dtype": "float32"},
        "batch": 4,
        "optim": {"lr": 1e-2, "warmup": 0},
        "train": {"steps": 3},
        "adapter": adapter,
        **more,
    }
    rows = chat_rows() if data is None else str(data)
    return tunesmith.train(options, data=rows, out=out, progress=progress)


def logits(model: Any) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def machine(run: tunesmith.Run) -> Any:
    return json.loads((run.folder / "machine.json").read_text())


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "llama": tiny_folder(folder / "llama"),
        "qwen3_moe": tiny_folder(folder / "moe", "qwen3_moe", **MOE),
    }


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_trains_and_loads_in_plain_peft_on_the_original_base(
    kind: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases[family]
    run = train(base, tmp_path / "R", section(kind, family))
    before, trained = logits(plain(base)), logits(run.model)
    assert (trained - before).abs().max() > 1e-3, "nothing was learned, so nothing is shown"
    again = logits(PeftModel.from_pretrained(plain(base), str(run.model_folder)))
    torch.testing.assert_close(again, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "family"), [("pissa", "llama"), ("lora", "qwen3_moe")])
def test_a_run_is_merged_from_the_command_line(
    kind: str, family: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    run = train(bases[family], tmp_path / "R", section(kind, family))
    out = tmp_path / "M"
    assert command(["merge", str(run.folder), "--out", str(out)]) == 0
    torch.testing.assert_close(logits(plain(out)), logits(run.model), rtol=1e-4, atol=1e-4)
    stops = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert (
        stops
        == json.loads((run.model_folder / "generation_config.json").read_text())["eos_token_id"]
    )
    assert "Tunesmith" in (out / "README.md").read_text()
    assert command(["merge", str(out), "--out", str(tmp_path / "N")]) == 2


@pytest.mark.parametrize(
    "kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_a_resumed_kind_ends_to_the_bit_the_same(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    family = "qwen3_moe" if kind in ON_EXPERTS else "llama"
    whole = train(bases[family], tmp_path / "whole", section(kind, family))
    often = {"checkpoint": {"every": 1, "keep": 5}}
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows())
    parted = train(bases[family], tmp_path / "parted", section(kind, family), data=rows, **often)
    newest = parted.folder / "checkpoints"
    saved = load_file(newest / "step-1" / "optimizer.safetensors")
    names = {name.split(".", 1)[1] for name in saved if name != "steps"}
    trained = {n for n, p in parted.model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("model.") for name in names} == trained
    for path in [newest / "step-2", newest / "step-3", parted.folder / "model"]:
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink()
        path.rmdir()
    resumed = tunesmith.resume(parted.folder, progress=False)
    for (name, one), (_, two) in zip(
        whole.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_kinds_that_expert_tensors_cannot_take_say_so(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="expert tensors") as caught:
        train(bases["qwen3_moe"], tmp_path / "R", {"kind": "dora"})
    assert "q_proj" in str(caught.value.hint)


def test_an_adapter_is_gone_on_with(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    first = train(base, tmp_path / "one", section("lora", targets=["q_proj", "v_proj"]))
    second = train(base, tmp_path / "two", {"continue_from": str(first.folder)})
    records = [json.loads(line) for line in (second.folder / "metrics.jsonl").open()]
    ours = [r["loss"] for r in records if r["kind"] == "train"]
    theirs = [
        r["loss"]
        for r in map(json.loads, (first.folder / "metrics.jsonl").open())
        if r["kind"] == "train"
    ]
    assert ours[0] < theirs[0]
    config = json.loads((second.model_folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert {name.rsplit(".", 1)[-1] for name in config["target_modules"]} == {"q_proj", "v_proj"}
    kept = (second.folder / "recipe.yaml").read_text()
    assert "kind: lora" in kept
    assert "rank: 4" in kept
    for wrong, what in (({"rank": 8}, "rank 4"), ({"kind": "dora"}, "kind lora")):
        with pytest.raises(InputError, match=what):
            train(base, tmp_path / "three", {"continue_from": str(first.folder), **wrong})
    with pytest.raises(InputError, match="is an adapter for"):
        train(bases["qwen3_moe"], tmp_path / "four", {"continue_from": str(first.folder)})
    with pytest.raises(InputError, match="whole model"):
        train(base, tmp_path / "five", {"continue_from": str(base)})


def test_only_chosen_parameters_are_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    before = dict(plain(base).named_parameters())
    for number, (adapter, expected) in enumerate(
        [
            ({"top_layers": 1}, {"layers.3", "model.norm", "lm_head"}),
            ({"parameters": r".*layers\.[01]\.mlp\..*"}, {"layers.0.mlp", "layers.1.mlp"}),
        ]
    ):
        run = train(base, tmp_path / f"R{number}", adapter)
        for name, parameter in run.model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == any(part in name for part in expected), name
        saved = load_file(next((run.folder / "checkpoints").iterdir()) / "optimizer.safetensors")
        assert not any("embed_tokens" in name for name in saved)
        torch.testing.assert_close(logits(plain(run.model_folder)), logits(run.model))
    for wrong, what in (({"parameters": "no_such"}, "matches no"), ({"top_layers": 9}, "4 layers")):
        with pytest.raises(InputError, match=what):
            train(base, tmp_path / "wrong", wrong)


def test_lora_plus_lets_b_learn_faster(bases: dict[str, Path], tmp_path: Path) -> None:
    # One step of AdamW moves every weight by the learning rate.
    runs = {
        ratio: train(
            bases["llama"],
            tmp_path / str(ratio),
            section("lora", lr_ratio=ratio),
            train={"steps": 1},
        )
        for ratio in (1.0, 16.0)
    }
    moved = {
        ratio: max(p.abs().max() for n, p in run.model.named_parameters() if ".lora_B." in n)
        for ratio, run in runs.items()
    }
    torch.testing.assert_close(moved[16.0] / moved[1.0], torch.tensor(16.0), rtol=1e-3, atol=0)
    down = [
        {n: p for n, p in run.model.named_parameters() if ".lora_A." in n} for run in runs.values()
    ]
    assert all(torch.equal(down[0][name], down[1][name]) for name in down[0])
    optim = {"lr": 1e-2, "warmup": 0, "lr_factors": {"lora_b": 16}}
    steps = {"steps": 1}
    group = train(bases["llama"], tmp_path / "G", section("lora"), optim=optim, train=steps)
    theirs = dict(runs[16.0].model.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in group.model.named_parameters())


def test_ranks_of_single_maps_are_trained_said_and_merged(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 8}
    adapter = section("lora", rank_pattern=ranks, alpha_pattern={"v_proj": 64})
    run = train(bases["llama"], tmp_path / "R", adapter, progress=True)
    again = PeftModel.from_pretrained(
        plain(bases["llama"]), str(run.model_folder), is_trainable=True
    )
    torch.testing.assert_close(logits(again), logits(run.model), rtol=1e-5, atol=1e-5)
    sizes = {n: p.shape[0] for n, p in again.named_parameters() if ".lora_A." in n}
    for name, rank in sizes.items():
        wanted = 2 if "down_proj" in name else 8 if "layers.0.self_attn.q_proj" in name else 4
        assert rank == wanted, name
    trained, total = again.get_nb_trainable_parameters()
    said = capsys.readouterr().err
    assert f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%}): " in said
    assert all(f"{kind} x4" in said for kind in (*ATTENTION, "gate_proj", "up_proj", "down_proj"))
    assert command(["merge", str(run.folder), "--out", str(tmp_path / "M")]) == 0
    torch.testing.assert_close(
        logits(plain(tmp_path / "M")), logits(run.model), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("asked", ["auto", True])
def test_dropout_turns_sharing_off_and_the_start_says_so(
    asked: Any, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = section("lora", dropout=0.1, lr_ratio=4)
    options = {"device": {"share_prefixes": asked}, "train": {"steps": 1}}
    run = train(bases["llama"], tmp_path / "R", adapter, progress=True, **options)
    assert machine(run)["chosen"]["share_prefixes"] is (asked is True)
    said = capsys.readouterr().err
    state = "shared, as asked" if asked is True else "not shared"
    assert f"with dropout layouts agree in expectation only, prefixes are {state}" in said
    assert "adapter: lora, rank 4, alpha 8" in said
    assert "B matrices learn at 4 times the rate" in said
    assert "q_proj x4" in said
    again = train(bases["llama"], tmp_path / "S", {"continue_from": str(run.folder)}, **options)
    assert machine(again)["chosen"]["share_prefixes"] is (asked is True)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_in_bfloat16_the_plain_lora_agrees_to_the_rounding_of_the_base(
    kind: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    base = bases["llama"]
    model = {"name": str(base), "dtype": "bfloat16"}
    run = train(base, tmp_path / "R", section(kind), model=model)
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    before = logits(start).float()
    again = logits(PeftModel.from_pretrained(start, str(run.model_folder))).float()
    trained = logits(run.model).float()
    rounding = (before - logits(plain(base))).norm()
    assert (trained - before).norm() > 10 * rounding
    assert (again - trained).norm() < 4 * rounding
