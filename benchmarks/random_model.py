"""A model of random weights in Qwen3's shape with a real tokenizer, for speed alone.

python benchmarks/random_model.py --tokenizer FOLDER --out DIR --hidden 256 --layers 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def write_model(tokenizer_folder: Path, out: Path, *, hidden: int, layers: int) -> None:
    """Write weights, tokenizer, template and stop tokens; heads are of 64, one key a pair."""
    from transformers import AutoTokenizer, Qwen3Config

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    heads = max(2, hidden // 64)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=3 * hidden,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
        head_dim=64, max_position_embeddings=16_384, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    parameters = save_random(config, tokenizer, out)
    print(json.dumps({"out": str(out), "parameters": parameters}))


def save_random(config: Any, tokenizer: Any, out: Path, *, dtype: str = "float32") -> int:
    """A folder with random weights of this config around the tokenizer; their number."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    write_model(
        arguments.tokenizer, arguments.out, hidden=arguments.hidden, layers=arguments.layers
    )


if __name__ == "__main__":
    main()
