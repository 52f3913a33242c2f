"""Check of a GGUF file: equal logits and equal token ids as the trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.data.row_errors import RowError
from tunesmith.data.templates.template import Template
from tunesmith.errors import ModelError
from tunesmith.export.gguf.back import read_encoder, read_model
from tunesmith.export.merge import PROBES

KL_ALLOWED = 0.01
"""Mean KL divergence, in nats for each token, of the file from the trained model."""
TOLERANCE = 1e-4
"""Relative L2 distance of logits from the same rounded weights."""
_DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
_QUESTION = {"role": "user", "content": "What is 17 plus 25?"}
_ANSWER = {"role": "assistant", "content": "17 + 25 = 42."}
_FOLLOW_UP = {"role": "user", "content": "Schön! And  in words,\nplease?"}
_SYSTEM = {"role": "system", "content": "You answer in one line."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "a question": [_QUESTION],
    "a second question": [_QUESTION, _ANSWER, _FOLLOW_UP],
    "a system prompt and a question": [_SYSTEM, _QUESTION],
    "a system prompt and two questions": [_SYSTEM, _QUESTION, _ANSWER, _FOLLOW_UP],
    "three questions": [_QUESTION, _ANSWER, _FOLLOW_UP, _ANSWER, _QUESTION],
}


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What the check found on the probe texts."""

    size: int  # bytes
    tokens: int  # compared positions
    kl: float  # nats, mean over the positions
    rounded: float | None  # relative distance from the rounded model's logits; None for q8_0


def check_file(
    path: Path, model: Any, template: Template, *, quantize: str, texts: Sequence[str]
) -> GgufReport:
    """Compare the file with the transformers model, whose weights are rounded as the file's.

    Raises:
        ModelError: other token ids, other logits, or a KL above what is allowed.
    """
    expected = template.encode(texts)
    encode = read_encoder(path)
    for text, ids in zip(texts, expected, strict=True):
        if encode(text) != ids:
            raise ModelError(
                f"the written vocabulary would read a probe text as other tokens: {text!r}",
                where=str(path),
                hint="--to hf keeps the tokenizer as it is",
            )
    probes = [torch.tensor([ids]) for ids in expected if ids]
    trained = _logits(model, probes)
    written = _logits(read_model(path), probes)
    kl = _kl(trained, written)
    rounded = None
    if quantize in _DTYPES:
        _round(model, _DTYPES[quantize])
        exact = _logits(model, probes)
        rounded = float((written - exact).norm() / exact.norm())
        if not rounded <= TOLERANCE:
            raise ModelError(
                f"the file computes another model: logits {rounded:.1e} apart from those of the "
                f"same weights rounded to {quantize}, {TOLERANCE:.0e} is allowed",
                where=str(path),
            )
    if not kl <= KL_ALLOWED:
        raise ModelError(
            f"{quantize} is too coarse for this model: mean KL {kl:.2g} nats from the trained one, "
            f"{KL_ALLOWED} is allowed",
            where=str(path),
            hint="--quantize f16" if quantize != "f16" else "--to hf",
        )
    return GgufReport(path.stat().st_size, len(trained), kl, rounded)


@torch.no_grad()
def _logits(model: Any, probes: Sequence[Tensor]) -> Tensor:
    found = [model(input_ids=ids, use_cache=False).logits[0].float() for ids in probes]
    return torch.cat(found)


def _kl(expected: Tensor, found: Tensor) -> float:
    first, second = (logits.double().log_softmax(-1) for logits in (expected, found))
    return float((first.exp() * (first - second)).sum(-1).mean())


@torch.no_grad()
def _round(model: Any, dtype: torch.dtype) -> None:
    for tensor in model.parameters():
        if tensor.ndim > 1:
            tensor.copy_(tensor.to(dtype))


def rendered_chats(template: Template) -> dict[str, str]:
    """The probe chats that the template takes, ready for an answer."""
    found: dict[str, str] = {}
    if not template.has_chat_template:
        return found
    for name, chat in CHATS.items():
        try:
            found[name] = template.render(chat, add_generation_prompt=True)
        except RowError:
            continue  # no system prompts, say; then there is nothing to compare
    return found


def probe_texts(template: Template) -> list[str]:
    """Plain texts, and the probe chats as the template writes them."""
    return [*PROBES, *rendered_chats(template).values()]
