"""GGUF read back as a transformers model and tokenizer, from the file alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.export.gguf.header import Header
from tunesmith.export.gguf.tensors import hub_state
from tunesmith.export.gguf.tokens import BYTE, CONTROL, SPACE, USER

Encode = Callable[[str], list[int]]
_MODEL_TYPES = {"gemma3": "gemma3_text"}


class WrittenFile:
    """The fields and tensors of a .gguf file."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        self._reader = GGUFReader(path)
        self.architecture = str(self.field("general.architecture"))

    def field(self, key: str) -> Any:
        """The value of a field, None where there is none; `{arch}` stands for the architecture."""
        name = key if "{" not in key else key.format(arch=self.architecture)
        found = self._reader.get_field(name)
        return None if found is None else found.contents()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors in float32."""
        from gguf import dequantize

        return {
            tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in self._reader.tensors
        }


def read_model(path: Path) -> Any:
    """The file's model in float32, built from its header."""
    from transformers import AutoConfig, AutoModelForCausalLM

    file = WrittenFile(path)
    tensors = file.tensors()
    factors = tensors.pop("rope_freqs.weight", None)
    bias = [part for part in ("q", "o") if f"blk.0.attn_{_BIAS_NAMES[part]}.bias" in tensors]
    tied = "output.weight" not in tensors
    values = _config(file, tied=tied) | {"attention_bias": bool(bias)}
    config = AutoConfig.for_model(_MODEL_TYPES.get(file.architecture, file.architecture), **values)
    heads = {name: int(values[key]) for name, key in _HEADS.items()}
    state = hub_state(tensors, Header(file.architecture, dict(heads)))
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if "q" in bias and "o" not in bias and file.architecture == "llama":
        for layer in range(int(values["num_hidden_layers"])):
            state[f"model.layers.{layer}.self_attn.o_proj.bias"] = torch.zeros(
                values["hidden_size"]
            )
    model.load_state_dict(state)
    if factors is not None:
        model.model.rotary_emb.inv_freq /= factors
    return model.eval()


_BIAS_NAMES = {"q": "q", "o": "output"}
_HEADS = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def _config(file: WrittenFile, *, tied: bool) -> dict[str, Any]:
    names = {
        "max_position_embeddings": "context_length",
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    }
    values = {name: file.field(f"{{arch}}.{key}") for name, key in names.items()}
    rope: dict[str, Any] = {
        "rope_type": file.field("{arch}.rope.scaling.type") or "default",
        "rope_theta": file.field("{arch}.rope.freq_base"),
    }
    if rope["rope_type"] != "default":
        rope["factor"] = file.field("{arch}.rope.scaling.factor")
        original = file.field("{arch}.rope.scaling.original_context_length")
        if original:
            rope["original_max_position_embeddings"] = original
    values |= {
        "vocab_size": len(file.field("tokenizer.ggml.tokens")),
        "tie_word_embeddings": tied,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return values | _gemma(file, values, rope)


def _gemma(file: WrittenFile, values: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """What runtimes know of gemma without a field for it, as they know it."""
    if not file.architecture.startswith("gemma"):
        return {}
    layers = values["num_hidden_layers"]
    period, largest = {"gemma2": (2, 46), "gemma3": (6, 62)}[file.architecture]
    whole = values["hidden_size"] // values["num_attention_heads"]
    result = {
        "sliding_window": file.field("{arch}.attention.sliding_window"),
        "query_pre_attn_scalar": whole if layers == largest else values["head_dim"],
        "attn_logit_softcapping": file.field("{arch}.attn_logit_softcapping"),
        "final_logit_softcapping": file.field("{arch}.final_logit_softcapping"),
        "layer_types": [
            "sliding_attention" if (i + 1) % period else "full_attention" for i in range(layers)
        ],
    }
    if file.architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": 10000.0}
        result["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return result


def read_encoder(path: Path) -> Encode:
    """From text to ids by the file's own vocabulary."""
    file = WrittenFile(path)
    tokens, types = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.token_type")
    if file.field("tokenizer.ggml.model") == "llama":
        return _pieces(file, tokens, types)
    return _byte_level(file, tokens, types)


def _byte_level(file: WrittenFile, tokens: list[str], types: list[int]) -> Encode:
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    from tunesmith.export.gguf.tokens import REGEX_OF

    pre = file.field("tokenizer.ggml.pre")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend: Any = Tokenizer(
        models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")  # pyright: ignore
    )
    steps: list[Any] = []
    if pre == "smollm":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if pre in REGEX_OF:
        steps.append(pre_tokenizers.Split(Regex(REGEX_OF[pre]), "isolated"))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in REGEX_OF)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    for kind in (CONTROL, USER):
        backend.add_special_tokens(
            [
                AddedToken(token, normalized=False)
                for token, found in zip(tokens, types, strict=True)
                if found == kind
            ]
        )
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _pieces(file: WrittenFile, tokens: list[str], types: list[int]) -> Encode:
    scores = file.field("tokenizer.ggml.scores")
    ids = {token: number for number, token in enumerate(tokens)}
    whole = sorted(
        (t for t, kind in zip(tokens, types, strict=True) if kind in (CONTROL, USER)),
        key=len,
        reverse=True,
    )
    raw = {int(t[1:-1], 16): i for i, t in enumerate(tokens) if types[i] == BYTE}
    prefix = bool(file.field("tokenizer.ggml.add_space_prefix"))

    def piece(text: str) -> list[int]:
        symbols = list(text.replace(" ", SPACE))
        while True:
            pairs = [
                (-scores[ids[left + right]], at)
                for at, (left, right) in enumerate(pairwise(symbols))
                if left + right in ids
            ]
            if not pairs:
                break
            _, at = min(pairs)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        found: list[int] = []
        for symbol in symbols:
            found += [ids[symbol]] if symbol in ids else [raw[b] for b in symbol.encode()]
        return found

    def encode(text: str) -> list[int]:
        result: list[int] = []
        after_special = True
        while text:
            hits = [(text.find(t), -len(t), t) for t in whole if t in text]
            start, _, token = min(hits) if hits else (len(text), 0, "")
            if start:
                result += piece((" " if prefix and after_special else "") + text[:start])
                after_special = False
            if token:
                result.append(ids[token])
                after_special = types[ids[token]] == CONTROL
            text = text[start + len(token) :]
        return result

    return encode
