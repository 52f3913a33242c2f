"""A merged model is its base with the adapters in: for plain transformers, to the rounding of the
dtype it is stored in.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny import tiny_folder, tiny_model, tiny_tokenizer
from tunesmith.cli.app import run as command
from tunesmith.export import merge as merging
from tunesmith.export.merge import find_part, merge_adapters
from tunesmith.model.adapters import AdapterSpec, AdapterState, add_adapter, save_adapter
from tunesmith.model.load import load_causal_lm
from tunesmith.model.resize_embeddings import add_rows
from tunesmith.model.source import resolve_model

KINDS = (
    "lora", "rslora", "dora", "pissa", "olora", "vera", "oft", "boft", "ia3", "loha", "lokr",
    "hra", "miss",
)  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
IDS = torch.tensor([[5, 17, 40, 200, 33, 91, 7, 300, 12, 64, 8, 9, 10]])
Capture = pytest.CaptureFixture[str]


def logits(model: Any) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    base.set_attn_implementation("eager")
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def adapter(base: Path, out: Path, *, seed: int = 1, **spec: Any) -> torch.Tensor:
    """Write an adapter with random values on `base`; returns the logits it makes."""
    causal_lm = load_causal_lm(resolve_model(str(base)), dtype="float32").model
    sizes = {"rank": 4, "alpha": 8, "rotation_size": 4}
    state = add_adapter(causal_lm, AdapterSpec(**{**sizes, **spec})).state
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in causal_lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    out.mkdir()
    save_adapter(causal_lm, state, out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (out / "adapter_config.json").write_text(json.dumps(config))
    return logits(causal_lm.model)


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges(kind: str, family: str, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", family, **(MOE if family == "qwen3_moe" else {}))
    whole = family == "llama" or kind in ("lora", "rslora")
    targets = "all-linear" if whole else ["q_proj", "k_proj", "v_proj", "o_proj"]
    expected = adapter(base, tmp_path / "A", kind=kind, targets=targets)
    before = logits(plain(base))
    assert (expected - before).norm() > 0.01 * before.norm()
    report = merge_adapters([find_part(str(tmp_path / "A"))], tmp_path / "M")
    assert report.merging < 1e-5
    assert report.reloading < 1e-5
    torch.testing.assert_close(logits(plain(tmp_path / "M")), expected, rtol=1e-4, atol=1e-4)
    theirs, ours = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "M/model.safetensors"),
    )
    assert set(ours) == set(theirs)
    assert {t.dtype for t in ours.values()} == {torch.float32}
    assert (tmp_path / "M/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_merged_apart(tied: bool, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=tied)
    for targets in (["lm_head"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]):
        folder = tmp_path / "-".join(targets)
        expected = adapter(base, folder, targets=targets)
        merge_adapters([find_part(str(folder))], tmp_path / "M", overwrite=True)
        torch.testing.assert_close(logits(plain(tmp_path / "M")), expected, rtol=1e-4, atol=1e-4)
        config = json.loads((tmp_path / "M/config.json").read_text())
        assert config["tie_word_embeddings"] is False


def test_the_weights_have_the_dtype_of_the_base(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    expected = adapter(tmp_path / "base", tmp_path / "A")
    report = merge_adapters([find_part(str(tmp_path / "A"))], tmp_path / "M")
    assert (report.dtype, report.reloading < 1e-5) == ("bfloat16", True)
    assert 1e-4 < report.rounding < 0.1
    ours = load_file(tmp_path / "M/model.safetensors")
    assert {t.dtype for t in ours.values()} == {torch.bfloat16}
    # rounded once: every weight is the one nearest to the float32 sum
    change = load_file(tmp_path / "A/adapter_model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    down, up = (change[f"base_model.model.{name}.lora_{x}.weight"].float() for x in "AB")
    weight = model.get_parameter(f"{name}.weight").float() + 2 * (up @ down)
    torch.testing.assert_close(ours[f"{name}.weight"].float(), weight, rtol=2**-8, atol=1e-6)
    found = logits(plain(tmp_path / "M"))
    assert (found - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("tied", [False, True])
def test_a_weighted_sum_of_adapters(tied: bool, tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=tied)
    adapter(base, tmp_path / "A", seed=1, kind="lora")
    adapter(base, tmp_path / "B", seed=2, kind="oft")
    adapter(base, tmp_path / "C", seed=3, targets=["lm_head"])
    names = [str(tmp_path / f"{name}={weight}") for name, weight in (("A", 0.7), ("B", -0.3))]
    out = tmp_path / "M"
    assert (
        command(["merge", "--model", str(base), *names, str(tmp_path / "C"), "--out", str(out)])
        == 0
    )
    alone = {}
    for name in "ABC":
        merge_adapters([find_part(str(tmp_path / name))], tmp_path / f"M{name}")
        alone[name] = plain(tmp_path / f"M{name}").state_dict()
    start = plain(base).state_dict()
    for name, found in plain(out).state_dict().items():
        sizes = {"A": 0.7, "B": -0.3, "C": 1.0}
        expected = start[name] + sum(w * (alone[a][name] - start[name]) for a, w in sizes.items())
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_with_tokens_of_its_own(tied: bool, tmp_path: Path) -> None:
    size = len(tiny_tokenizer())
    base = tiny_folder(tmp_path / "base", vocab_size=size, tie_word_embeddings=tied)
    causal_lm = load_causal_lm(resolve_model(str(base)), dtype="float32").model
    add_rows(causal_lm, [size, size + 1], padded=False)
    added = AdapterState(new_rows=(size, size + 1))
    state = add_adapter(causal_lm, AdapterSpec(rank=4, alpha=8), added).state
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in causal_lm.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    (tmp_path / "A").mkdir()
    save_adapter(causal_lm, state, tmp_path / "A")
    config = json.loads((tmp_path / "A/adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(base)
    (tmp_path / "A/adapter_config.json").write_text(json.dumps(config))
    merge_adapters([find_part(str(tmp_path / "A"))], tmp_path / "M")
    assert json.loads((tmp_path / "M/config.json").read_text())["vocab_size"] == size + 2
    found, expected = logits(plain(tmp_path / "M")), logits(causal_lm.model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(merging.ModelError, match="tokens of its own"):
        merge_adapters([find_part(str(tmp_path / "A"), weight=0.5)], tmp_path / "N")


def test_a_merge_that_changes_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter(base, tmp_path / "A")

    def lossy(causal_lm: Any, adapter: AdapterState) -> AdapterState:
        causal_lm.replace_model(causal_lm.model.unload())
        return adapter

    monkeypatch.setattr(merging, "fold", lossy)
    with pytest.raises(merging.ModelError, match="would change"):
        merge_adapters([find_part(str(tmp_path / "A"))], tmp_path / "M")
    assert not (tmp_path / "M").exists()
    assert not list(tmp_path.glob(".merging*"))


def test_a_folder_that_reads_back_otherwise_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_folder(tmp_path / "base")
    adapter(base, tmp_path / "A")
    write = merging.write_model

    def damaged(model: Any, *args: Any, **options: Any) -> None:
        write(model, *args, **options)
        path = args[2] / "model.safetensors"
        shutil.copyfile(base / "model.safetensors", path)

    monkeypatch.setattr(merging, "write_model", damaged)
    with pytest.raises(merging.RunError, match="other logits"):
        merge_adapters([find_part(str(tmp_path / "A"))], tmp_path / "M")
    assert not (tmp_path / "M").exists()


def test_wrong_input_is_refused(tmp_path: Path, capsys: Capture) -> None:
    base, other = tiny_folder(tmp_path / "base"), tiny_folder(tmp_path / "other", seed=1)
    adapter(base, tmp_path / "A")
    adapter(other, tmp_path / "B")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    a, b, out = (str(tmp_path / name) for name in ("A", "B", "M"))
    for arguments, said in (
        ([a, b, "--out", out], "different bases"),
        ([a, "--model", str(other), "--out", out], "is an adapter for"),
        ([str(base), "--out", out], "no adapter"),
        ([f"{a}=much", "--out", out], "is not a weight"),
        ([f"{a}=0", "--out", out], "is not a weight"),
        ([a, "--out", str(tmp_path / "full")], "not empty"),
        ([a, "--out", a, "--overwrite"], "merged from"),
        ([str(tmp_path / "nothing"), "--out", out], "no such file"),
    ):
        assert command(["merge", *arguments]) == 2, arguments
        assert said in capsys.readouterr().err
    assert not Path(out).exists()
    assert (tmp_path / "full/file").read_text() == "mine"


def test_a_base_that_has_moved_is_given(tmp_path: Path, capsys: Capture) -> None:
    base = tiny_folder(tmp_path / "base")
    expected = adapter(base, tmp_path / "A")
    base.rename(tmp_path / "moved")
    out = tmp_path / "M"
    arguments = ["merge", str(tmp_path / "A"), "--out", str(out), "--json"]
    assert command(arguments) == 2
    capsys.readouterr()
    assert command([*arguments, "--model", str(tmp_path / "moved")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["dtype"], said["out"]) == ("float32", str(out))
    torch.testing.assert_close(logits(plain(out)), expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(out)("Paris")["input_ids"]
