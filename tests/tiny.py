"""Tiny random models of many families and a BPE tokenizer trained on the spot: real components, no
download.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog and runs into the forest.",
    "What is the capital of France? The capital of France is Paris.",
    "Add 12 and 30: 12 + 30 = 42. Divide 84 by 2: the answer is 42.",
    "system user assistant tool role content name arguments function type object",
    '{"name": "get_weather", "arguments": {"city": "Oslo", "unit": "celsius"}}',
    "Please write a short poem about rivers, stones and the evening light.",
] * 4

COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=None,
    eos_token_id=2,
    tie_word_embeddings=False,
)
WINDOW = dict(sliding_window=8)
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen3": {},
    "gemma2": dict(WINDOW, tie_word_embeddings=True),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": dict(
        num_key_value_heads=4,
        head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        moe_intermediate_size=32,
        q_lora_rank=32,
        kv_lora_rank=24,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_nextn_predict_layers=0,
    ),
}


@functools.cache
def _trained_tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(
    template: str | None = CHATML, *, extra_special: tuple[str, ...] = (), **special: str
):
    """A transformers tokenizer: byte-level BPE; `<|im_end|>` ends turns and pads, as SmolLM2's."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(_trained_tokenizer_json())
    if extra_special:
        backend.add_special_tokens(
            [AddedToken(t, normalized=False, special=True) for t in extra_special]
        )
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, model_max_length=512, **names
    )


def tiny_config(family: str = "llama", *, vocab_size: int = 448, **options):
    from transformers import AutoConfig

    return AutoConfig.for_model(
        family, **{**COMMON, "vocab_size": vocab_size, **FAMILIES.get(family, {}), **options}
    )


def tiny_model(family: str = "llama", *, seed: int = 0, attention: str = "eager", **options):
    """A float32 causal LM with random weights, large enough that errors show."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        tiny_config(family, **options), attn_implementation=attention
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
        elif "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def tiny_folder(
    folder: Path, family: str = "llama", *, template: str | None = CHATML, **options
) -> Path:
    """A folder as the hub has it: weights, config, generation config, tokenizer and template."""
    model = tiny_model(family, **options)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat_rows(count: int = 12) -> list[dict]:
    """Short chats with a shared system prompt, one to three turns each."""
    system = {"role": "system", "content": "You add numbers and answer with the sum alone."}
    rows = []
    for i in range(count):
        messages = [system]
        for turn in range(1 + i % 3):
            messages.append({"role": "user", "content": f"What is {i} plus {turn}?"})
            messages.append({"role": "assistant", "content": f"{i + turn}"})
        rows.append({"messages": messages})
    return rows


def difference(one, two) -> float:
    """Norm of the difference of two runs' weights, relative to the norm of the second's."""
    a, b = one.weights, two.weights
    assert a.keys() == b.keys()
    squares = sum(float((a[n] - b[n]).double().square().sum()) for n in a)
    return (squares / sum(float(t.double().square().sum()) for t in b.values())) ** 0.5


def chat_inputs(folder: Path, *, held_out: int = 0) -> dict[str, str]:
    """Paths of a small llama, of fourteen chats to learn, and of others to evaluate with."""
    found = {
        "model": str(tiny_folder(folder / "llama", num_hidden_layers=2)),
        "data": str(write_jsonl(folder / "rows.jsonl", chat_rows(14))),
    }
    if held_out:
        rows = chat_rows(14 + held_out)[14:]
        found["eval"] = str(write_jsonl(folder / "eval.jsonl", rows))
    return found


def four_steps(given: dict[str, str], out: Path, *options: str) -> Path:
    """A short run over `chat_inputs` in float32, evaluated and saved every other step."""
    import tunesmith

    common = ["train.steps=4", "optim.lr=0.003", "batch.documents=4", "eval.every=2",
              "model.dtype=float32", "checkpoint.every=2", "checkpoint.keep=9"]  # fmt: skip
    tunesmith.train(out=out, overrides=[*common, *options], progress=False, **given)
    return out
