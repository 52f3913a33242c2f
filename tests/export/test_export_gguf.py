"""A written .gguf computes what the model computes, reads text as it does, or is not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tiny import tiny_folder, tiny_model, tiny_tokenizer
from tunesmith.cli.app import run
from tunesmith.data.templates.load import load_template
from tunesmith.errors import ModelError
from tunesmith.export.gguf import check, export_gguf, write
from tunesmith.export.gguf.back import WrittenFile
from tunesmith.export.gguf.tensors import permute, unpermute
from tunesmith.export.gguf.tokens import pre_tokenizer
from tunesmith.model.gguf import convert_gguf
from tunesmith.model.load import load_causal_lm
from tunesmith.model.source import resolve_model

gguf = pytest.importorskip("gguf")
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]


def folder_of(path: Path, family: str, **options) -> Path:
    """A tiny folder whose norms are not the neutral ones a fresh model has."""
    if family.startswith("gemma"):
        options = dict(query_pre_attn_scalar=16, **options)
    model = tiny_model(family, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.linspace(-0.3, 0.3, parameter.numel()))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def written(tmp_path: Path, family: str, quantize: str = "f16", **options):
    source = resolve_model(str(folder_of(tmp_path / "model", family, **options)))
    model = load_causal_lm(source, dtype="float32").model
    out = tmp_path / "out.gguf"
    return out, export_gguf(model, load_template(source.folder), out, quantize=quantize)


@pytest.mark.parametrize("quantize", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reloads(family: str, quantize: str, tmp_path: Path) -> None:
    path, report = written(tmp_path, family, quantize)
    assert report.kl < check.KL_ALLOWED
    assert report.size == path.stat().st_size
    if quantize != "q8_0":
        assert report.rounded is not None
        assert report.rounded < 1e-5


def test_our_reader_gives_the_rounded_model_back(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "llama")
    convert_gguf(path, tmp_path / "again", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    first = load_causal_lm(resolve_model(str(tmp_path / "model")), dtype="float32").model
    second = load_causal_lm(resolve_model(str(tmp_path / "again")), dtype="float32").model
    with torch.no_grad(), first.generation() as one, second.generation() as two:
        check._round(one, torch.float16)
        torch.testing.assert_close(one(ids).logits, two(ids).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_transformers_reads_the_same_logits(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    # that reader takes qwen3's heads to be 128 wide whatever the header says
    wide = dict(head_dim=128) if family == "qwen3" else {}
    path, _ = written(tmp_path, family, **wide)
    source = resolve_model(str(tmp_path / "model"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad(), load_causal_lm(source, dtype="float32").model.generation() as plain:
        check._round(plain, torch.float16)
        torch.testing.assert_close(other(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="linear", factor=2.0),
        dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=128),
        dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ],
)  # fmt: skip
def test_scaled_rope_reloads(rope: dict, tmp_path: Path) -> None:
    parameters = dict(rope, rope_theta=10000.0)
    _, report = written(tmp_path, "llama", rope_parameters=parameters)
    assert report.rounded is not None
    assert report.rounded < 1e-4


def test_odd_rows_stay_f16(tmp_path: Path) -> None:
    path, _ = written(tmp_path, "llama", "q8_0", intermediate_size=72)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(path).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_header_holds_template_and_ends(tmp_path: Path) -> None:
    file = WrittenFile(written(tmp_path, "qwen2")[0])
    assert file.field("tokenizer.chat_template") == tiny_tokenizer().chat_template
    assert file.field("tokenizer.ggml.eos_token_id") == 2
    assert file.field("tokenizer.ggml.add_bos_token") is False


def test_a_wrong_file_is_refused_and_removed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tunesmith.export.gguf.tensors.permute", lambda tensor, heads: tensor)
    with pytest.raises(ModelError, match="another model"):
        written(tmp_path, "llama")
    assert not list(tmp_path.glob("*.gguf*"))
    assert not list(tmp_path.glob(".*gguf*"))


def test_wrong_vocabulary_is_refused(tmp_path: Path, monkeypatch) -> None:
    right = write.read_vocabulary

    def fewer(template, rows):
        vocabulary = right(template, rows)
        del vocabulary.merges[20:]
        return vocabulary

    monkeypatch.setattr(write, "read_vocabulary", fewer)
    with pytest.raises(ModelError, match="other tokens"):
        written(tmp_path, "llama")


def test_other_families_and_pre_tokenizers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mixtral"):
        written(tmp_path, "mixtral")
    steps = {"type": "Whitespace"}
    with pytest.raises(ModelError, match="Whitespace"):
        pre_tokenizer({"normalizer": None, "pre_tokenizer": steps, "model": {}})


def test_permutation_makes_pairs_of_halves() -> None:
    rows = torch.arange(8)[:, None]
    assert permute(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert torch.equal(unpermute(permute(rows, 2), 2), rows)


def test_command_says_size_and_distance(tmp_path: Path, capsys) -> None:
    folder = tiny_folder(tmp_path / "model")
    out = tmp_path / "out"
    assert run(["export", str(folder), "--to", "ollama", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["files"]) == sorted(path.name for path in out.iterdir())
    assert 'PARAMETER stop "<|im_end|>"' in (out / "Modelfile").read_text()
    assert run(["export", str(folder), "--to", "gguf", "--out", str(out)]) == 2
    assert run(["export", str(folder), "--to", "adapter", "--out", str(tmp_path / "x")]) == 2
    assert run(["export", str(folder), "--to", "onnx", "--out", str(tmp_path / "x")]) == 2


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("TUNESMITH_SMOLLM2"), reason="TUNESMITH_SMOLLM2 is not set")
@pytest.mark.parametrize("quantize", ["f16", "q8_0"])
def test_smollm2(quantize: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    name = os.environ["TUNESMITH_SMOLLM2"]
    assert run(["export", name, "--to", "ollama", "--quantize", quantize, "--out", str(out)]) == 0
    file = WrittenFile(next(out.glob("*.gguf")))
    assert file.field("tokenizer.ggml.pre") == "smollm"
