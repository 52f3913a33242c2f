"""Batched generation with transformers' `generate`; each row samples as if it were alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from tunesmith.data.templates.template import Template
from tunesmith.errors import DataError
from tunesmith.model.causal_lm import CausalLM

BATCH_TOKENS = 16_384


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer: its ids with the stop token if one came, and its text without special tokens."""

    ids: tuple[int, ...]
    text: str
    stopped: bool  # ended by a stop token, not by the limit of new tokens


@dataclass(frozen=True, slots=True)
class Options:
    """How tokens are chosen. Temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise DataError("max_new_tokens must be at least 1")
        if self.temperature < 0:
            raise DataError("temperature must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise DataError("top_p must be above 0 and at most 1")


def generate(
    model: CausalLM,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Generation]:
    """The model's answers to prompts given as ids, in their order.

    An answer ends with a stop id of the template, after `max_new_tokens`, or where the model's
    context is full. What a row gets does not depend on its neighbours, beyond rounding; row i
    samples from `seed` and i. `batch_tokens` bounds rows x (longest prompt + new tokens) of a
    batch.

    Raises:
        DataError: an empty prompt, one that fills the context, or an option out of range.
    """
    options = Options(max_new_tokens, temperature, top_p, seed)
    found = dict(answers(model, template, prompts, options, batch_tokens=batch_tokens))
    return [found[row] for row in range(len(prompts))]


def answers(
    model: CausalLM,
    template: Template,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    batch_tokens: int = BATCH_TOKENS,
    first_row: int = 0,
) -> Iterator[tuple[int, Generation]]:
    """(number of the prompt, its answer), batch by batch; sampling counts rows from `first_row`."""
    limits = [new_tokens(ids, template, options, row) for row, ids in enumerate(prompts)]
    for batch in _batches(prompts, limits, batch_tokens):
        ids = _run(model, template, [prompts[row] for row in batch], limit=limits[batch[0]],
                   sampler=_sampler([first_row + row for row in batch], options))  # fmt: skip
        for row, new in zip(batch, ids, strict=True):
            yield row, finish(new, template)


def new_tokens(ids: Sequence[int], template: Template, options: Options, row: int = 0) -> int:
    """How many tokens may follow this prompt."""
    if len(ids) == 0:
        raise DataError("the prompt has no tokens", where=f"prompt {row}")
    context = template.context_length
    room = (
        options.max_new_tokens
        if context is None
        else min(options.max_new_tokens, context - len(ids))
    )
    if room < 1:
        raise DataError(
            f"the prompt has {len(ids)} tokens, the model's context holds {context}",
            where=f"prompt {row}",
            hint="shorten it",
        )
    return room


def _batches(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], batch_tokens: int
) -> Iterator[list[int]]:
    """Rows of like length and equal limit, longest first: what does not fit fails at once."""
    order = sorted(range(len(prompts)), key=lambda row: (-limits[row], -len(prompts[row]), row))
    batch: list[int] = []
    for row in order:
        if batch:
            longest = len(prompts[batch[0]]) + limits[batch[0]]
            if limits[row] != limits[batch[0]] or (len(batch) + 1) * longest > batch_tokens:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _sampler(rows: Sequence[int], options: Options) -> RowSampler | None:
    if options.temperature == 0:
        return None
    return RowSampler(rows, temperature=options.temperature, top_p=options.top_p, seed=options.seed)


def _run(
    model: CausalLM,
    template: Template,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    sampler: RowSampler | None,
) -> list[list[int]]:
    """New ids of each row, padding included."""
    width = max(len(ids) for ids in prompts)
    padding = pad_id(template)
    rows = [[padding] * (width - len(ids)) + [int(i) for i in ids] for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    with plain_generation(model, template, limit) as (hf_model, config):
        device = next(hf_model.parameters()).device
        output: Tensor = hf_model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler] if sampler else []),
        )
    return output[:, width:].tolist()


@contextmanager
def plain_generation(
    model: CausalLM, template: Template, limit: int
) -> Iterator[tuple[Any, GenerationConfig]]:
    """The transformers model and a config that takes the arg max until a stop id or `limit` tokens.

    The model's own generation config would fill in its penalties and sampling defaults; it is set
    aside meanwhile.
    """
    stops = sorted(template.stop_ids)
    config = GenerationConfig(
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops or None,
        pad_token_id=pad_id(template),
        use_cache=True,
    )
    base = model.base
    before = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        with model.generation() as hf_model, torch.no_grad():
            yield hf_model, config
    finally:
        base.generation_config = before


def pad_id(template: Template) -> int:
    """Any id will do where the mask is 0; the tokenizer's own if it has one."""
    padding = template.tokenizer.pad_token_id
    return int(padding) if padding is not None else min(template.stop_ids, default=0)


def finish(ids: Sequence[int], template: Template) -> Generation:
    """The answer in raw output: up to and including its first stop id."""
    for at, token in enumerate(ids):
        if token in template.stop_ids:
            return Generation(tuple(ids[: at + 1]), visible_text(ids[:at], template), True)
    return Generation(tuple(ids), visible_text(ids, template), False)


def visible_text(ids: Sequence[int], template: Template) -> str:
    """Text of ids without special tokens; other added tokens, such as tool-call marks, stay."""
    return template.tokenizer.decode(
        [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


class RowSampler(LogitsProcessor):
    """Turns scores [B, V] into ones whose arg max is a sample at `temperature` from the nucleus
    `top_p`.

    Row b draws from a generator of its own, seeded by `seed` and `rows[b]`.
    """

    def __init__(self, rows: Sequence[int], *, temperature: float, top_p: float, seed: int) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self.generators = [torch.Generator().manual_seed(_mixed(seed, row)) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        log_p = torch.log_softmax(scores.float() / self.temperature, -1)
        log_p = _nucleus(log_p, self.top_p)
        # Drawn on the CPU, so that a row's numbers are the same on every device.
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g) for g in self.generators])
        exponential = -torch.log(uniform.clamp_min(1e-20)).to(scores.device)
        return log_p - torch.log(exponential.clamp_min(1e-20))


def _nucleus(log_p: Tensor, top_p: float) -> Tensor:
    """Only the fewest, most likely tokens whose probabilities reach `top_p` stay possible."""
    if top_p >= 1:
        return log_p
    ordered, order = log_p.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    outside = torch.zeros_like(log_p, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return log_p.masked_fill(outside, float("-inf"))


def _mixed(seed: int, row: int) -> int:
    """A seed of 63 bits from two numbers; neighbours are far apart (multiplicative hashing)."""
    return (seed * 0x9E3779B97F4A7C15 + (row + 1) * 0xD1B54A32D192ED03) % (1 << 63)
