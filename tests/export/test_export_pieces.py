"""SentencePiece vocabularies, adapters and tokens of its own reach the file too."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import CORPUS, tiny_folder, tiny_model
from tunesmith.data.templates.load import load_template
from tunesmith.export.gguf import export_gguf
from tunesmith.export.gguf.back import WrittenFile, read_encoder
from tunesmith.export.gguf.tokens import BYTE, CONTROL, UNKNOWN
from tunesmith.export.run import export
from tunesmith.model.load import load_causal_lm
from tunesmith.model.source import resolve_model

pytest.importorskip("gguf")
PLAIN = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"


def pieces_tokenizer(prefix: bool):
    """A BPE over characters with byte fallback, as SentencePiece's vocabularies become."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + steps)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>", *raw], show_progress=False
    )
    backend.train_from_iterator([word for line in CORPUS for word in line.split()], trainer)
    import json

    values = json.loads(backend.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    values["model"]["vocab"].setdefault("▁", len(values["model"]["vocab"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(values)),
        chat_template=PLAIN, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_are_read_alike(prefix: bool, tmp_path: Path) -> None:
    model = tiny_model("mistral")
    model.save_pretrained(tmp_path / "m")
    pieces_tokenizer(prefix).save_pretrained(tmp_path / "m")
    source = resolve_model(str(tmp_path / "m"))
    template = load_template(source.folder)
    out = tmp_path / "o.gguf"
    export_gguf(load_causal_lm(source, dtype="float32").model, template, out)
    file = WrittenFile(out)
    assert file.field("tokenizer.ggml.model") == "llama"
    assert file.field("tokenizer.ggml.add_space_prefix") is prefix
    assert file.field("tokenizer.ggml.add_bos_token") is True
    assert file.field("tokenizer.ggml.token_type")[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE]
    text = "<s>The  answer is 42, 今日.</s>"
    assert read_encoder(out)(text) == template.encode([text])[0]


def test_an_adapter_is_merged_on_the_way(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny_folder(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    told: list[str] = []
    out = tmp_path / "out"
    result = export(str(tmp_path / "adapter"), "gguf", out, on_status=told.append)
    assert told[0].startswith("merging")
    assert result["kl"] < 0.01
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    copied = export(str(tmp_path / "adapter"), "adapter", tmp_path / "a", on_status=told.append)
    assert "adapter_model.safetensors" in copied["files"]
    whole = export(str(tmp_path / "adapter"), "hf", tmp_path / "h", on_status=told.append)
    assert "model.safetensors" in whole["files"]
    assert "adapter_config.json" not in whole["files"]
    assert "\nvllm serve h\n" in (tmp_path / "h" / "README.md").read_text()
