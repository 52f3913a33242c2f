"""GGUF reader of the llama architecture: a .gguf file converted to a folder in Hugging Face
format.

`from_pretrained(gguf_file=)` of transformers is not used here. It gives the same logits for plain
files, but it does not look at `tokenizer.ggml.pre` (SmolLM2's tokenizer then leaves `12345` in one
piece, where the model was trained on single digits), and it reads files with scaled RoPE or with a
tensor `rope_freqs` as if they had plain RoPE (seen with transformers 5.23). Both give a wrong model
without a word; here such a file is read right or refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import ModelError

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL = 3  # token_type of a special token
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "smollm")
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""What every converted folder holds; a chat template comes on top where the file has one."""


def cached_conversion(path: Path) -> Path:
    """The converted folder of a file, made once and kept under its sha256 in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(home).expanduser() / "tunesmith" / "gguf" / file_sha256(path)
    if not is_complete(folder):
        convert_gguf(path, folder)
    return folder


def is_complete(folder: Path) -> bool:
    """True if every file of a conversion is there."""
    return all((folder / name).is_file() for name in FILES)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def convert_gguf(path: Path, out: Path, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write folder `out` from the file at `path`; it appears whole or not at all.

    Raises:
        ModelError: another architecture or tokenizer than those known here, or a damaged file.
    """
    reader = _Reader(path)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        config = reader.config(dtype)
        _write_json(scratch / "config.json", config)
        special = {key: config[key] for key in _SPECIAL_IDS if key in config}
        _write_json(scratch / "generation_config.json", special)
        reader.write_tokenizer(scratch, config["max_position_embeddings"])
        reader.write_weights(scratch / "model.safetensors", config, dtype)
        scratch.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Reader:
    """One .gguf file; every accessor refuses what it does not know by name."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise ModelError(
                "reading .gguf files needs the package gguf",
                where=str(path),
                hint="pip install 'tunesmith[gguf]'",
            ) from error
        self.where = str(path)
        try:
            self.reader = GGUFReader(path)
        except (ValueError, OSError, IndexError) as error:
            raise ModelError(f"is no readable .gguf file: {error}", where=self.where) from error
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise self.refused(
                f"its architecture {architecture!r} can't be converted, only 'llama'"
            )
        if self.field("llama.expert_count", 0):
            raise self.refused("experts in a .gguf can't be converted")
        if self.field("llama.rope.scaling.type", "none") != "none":
            raise self.refused("scaled RoPE in a .gguf can't be converted")

    def field(self, key: str, default: Any = ...) -> Any:
        found = self.reader.get_field(key)
        if found is not None:
            return found.contents()
        if default is ...:
            raise self.refused(f"its header lacks {key}")
        return default

    def refused(self, message: str) -> ModelError:
        hint = "give the model's hub id or its folder in Hugging Face format"
        return ModelError(message, where=self.where, hint=hint)

    def config(self, dtype: torch.dtype) -> dict[str, Any]:
        """config.json, with the names of both generations of transformers side by side."""
        heads, hidden = (
            self.field("llama.attention.head_count"),
            self.field("llama.embedding_length"),
        )
        head_dim = self.field("llama.attention.key_length", hidden // heads)
        theta = float(self.field("llama.rope.freq_base", 10000.0))
        if self.field("llama.rope.dimension_count", head_dim) != head_dim:
            raise self.refused("partial RoPE in a .gguf can't be converted")
        names = {tensor.name for tensor in self.reader.tensors}
        kind = str(dtype).removeprefix("torch.")
        special = {
            key: self.field(f"tokenizer.ggml.{name}_token_id", None)
            for key, name in zip(_SPECIAL_IDS, ("bos", "eos", "padding"), strict=True)
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            **{key: value for key, value in special.items() if value is not None},
            "dtype": kind,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": hidden,
            "initializer_range": hidden**-0.5,
            "intermediate_size": self.field("llama.feed_forward_length"),
            "max_position_embeddings": self.field("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": self.field("llama.block_count"),
            "num_key_value_heads": self.field("llama.attention.head_count_kv", heads),
            "pretraining_tp": 1,
            "rms_norm_eps": round(float(self.field("llama.attention.layer_norm_rms_epsilon")), 8),
            "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
            "rope_scaling": None,
            "rope_theta": theta,
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": kind,
            "use_cache": True,
            "vocab_size": len(self.field("tokenizer.ggml.tokens")),
        }

    def write_weights(self, path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
        from gguf import dequantize
        from safetensors.torch import save_file

        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        state: dict[str, Tensor] = {}
        for tensor in self.reader.tensors:
            name = self._hub_name(tensor.name)
            weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            part = tensor.name.split(".")[-2]
            if part in heads:
                weight = _unpermute(weight, heads[part])
            state[name] = weight.to(dtype).contiguous()
        wanted = 9 * config["num_hidden_layers"] + (2 if config["tie_word_embeddings"] else 3)
        if len(state) != wanted:
            raise self.refused(f"it holds {len(state)} tensors where its header asks for {wanted}")
        save_file(state, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes it readable for its owner only

    def _hub_name(self, name: str) -> str:
        if name in _OUTER_NAMES:
            return _OUTER_NAMES[name]
        block, _, rest = name.partition(".")
        layer, _, part = rest.partition(".")
        part = part.removesuffix(".weight")
        if block != "blk" or part not in _LAYER_NAMES or not name.endswith(".weight"):
            raise self.refused(f"its tensor {name} has no place in the llama architecture")
        return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"

    def write_tokenizer(self, folder: Path, max_length: int) -> None:
        """tokenizer.json, tokenizer_config.json and the chat template."""
        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        backend = self._backend(tokens)
        bos = self.field("tokenizer.ggml.bos_token_id", None)
        if self.field("tokenizer.ggml.add_bos_token", False) and bos is not None:
            from tokenizers import processors

            text = tokens[bos]
            backend.post_processor = processors.TemplateProcessing(
                single=f"{text} $A", pair=f"{text} $A {text} $B", special_tokens=[(text, bos)]
            )  # pyright: ignore[reportCallIssue]
        backend.save(str(folder / "tokenizer.json"))
        names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
        ids = {
            key: self.field(f"tokenizer.ggml.{name}_token_id", None) for key, name in names.items()
        }
        settings: dict[str, Any] = {
            f"{key}_token": tokens[number] for key, number in ids.items() if number is not None
        }
        settings |= {
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        template = self.field("tokenizer.chat_template", None)
        if template is not None:
            settings["chat_template"] = template
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", settings)

    def _backend(self, tokens: list[str]) -> Any:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        kind, pre = self.field("tokenizer.ggml.model"), self.field("tokenizer.ggml.pre", "default")
        if kind != "gpt2":
            raise self.refused(f"its tokenizer {kind!r} can't be converted, only byte-level BPE")
        if pre not in _PRE_TOKENIZERS:
            known = ", ".join(_PRE_TOKENIZERS)
            raise self.refused(f"its pre-tokenizer {pre!r} is unknown; known are {known}")
        merges = [tuple(merge.split(" ")) for merge in self.field("tokenizer.ggml.merges")]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        llama3 = pre == "llama-bpe"
        backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=llama3))  # pyright: ignore
        first = {
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")],
            "gpt-2": [],
        }[pre]
        last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not llama3)
        backend.pre_tokenizer = pre_tokenizers.Sequence([*first, last])  # pyright: ignore
        backend.decoder = decoders.ByteLevel()  # pyright: ignore
        types = self.field("tokenizer.ggml.token_type")
        control = [t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        backend.add_special_tokens([AddedToken(token, normalized=False) for token in control])
        return backend


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rotary rows from pairs (2i, 2i + 1), as .gguf files have them, to halves (i, i + d/2)."""
    rows, columns = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
