"""The self-test before training: equal hidden states packed, as a prefix tree, and one document at
a time.

The reference is the model's own attention, one path at a time. A model that differs is run that
way; one whose logits our head can't reproduce, or that sees later tokens, is refused. A few hundred
tokens in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tunesmith.errors import ModelError, first_line
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.lm_head import LogitTransform
from tunesmith.model.selftest_probe import Probe, in_float32, native


@dataclass(frozen=True, slots=True)
class SelfTest:
    """What was found; `differences` and `tolerance` are relative to the norm of the reference."""

    unpacked: bool  # one path at a time, with the model's own attention
    differences: Mapping[str, float]
    tolerance: float
    noisy: bool  # dropout or noise in routing: training mode gives other hidden states
    notes: tuple[str, ...]
    logits: LogitTransform  # of the model; the one its config names, or one found by value


def self_test(causal_lm: CausalLM, *, max_length: int) -> SelfTest:
    """Test the model on made-up tokens; afterwards it is isolated if it must be, else as before.

    `max_length` is the longest path that will be trained: RoPE that looks at the longest position
    of a call must not let a neighbour of that length change a short document.

    Raises:
        ModelError: the head's logits differ from the model's, or it is not causal: no way of
            running it would be right.
    """
    training = causal_lm.training
    causal_lm.eval()
    try:
        with torch.no_grad():
            return _run(causal_lm, max_length)
    finally:
        causal_lm.train(training)


def _refusal(causal_lm: CausalLM, check: str, difference: float) -> ModelError:
    where = _place(causal_lm)
    if not math.isfinite(difference):  # `relative_difference` makes NaN infinite
        return ModelError(
            "what it computes is not a number (NaN); its weights hold NaN or infinity",
            where=where,
            hint="the files may be damaged: get the model again",
        )
    return ModelError(
        f"{_REFUSED[check]} (relative difference {difference:.1e})",
        where=where,
        hint="train a model whose architecture transformers itself holds",
    )


def _place(causal_lm: CausalLM) -> str:
    return str(getattr(causal_lm.config, "_name_or_path", "") or "model")


@contextmanager
def _on_text_alone(causal_lm: CausalLM) -> Iterator[None]:
    """Whatever a model class raises at a row of text is an error of the model."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"a forward pass over text fails: {type(error).__name__}: {first_line(error)}",
            where=_place(causal_lm),
            hint="is its config.json the one of its weights? Train a model that reads text without "
            "images or sound",
        ) from error


def _run(causal_lm: CausalLM, max_length: int) -> SelfTest:
    probe = Probe(causal_lm, max_length)
    differences: dict[str, float] = {}
    with native(causal_lm), in_float32(causal_lm, probe.upcast):
        with _on_text_alone(causal_lm):
            probe.learn_references()
        for name, check in (("head", probe.head), ("causal", probe.causal)):
            with _on_text_alone(causal_lm):
                differences[name] = check()
            if not differences[name] <= probe.rounding:
                raise _refusal(causal_lm, name, differences[name])
    reason = None
    for name, check in (
        ("packed", probe.packed),
        ("tree", probe.tree),
        ("neighbour", probe.neighbour),
    ):
        if causal_lm.unpacked:
            break
        with in_float32(causal_lm, probe.upcast):
            found = _measure(check)
        if isinstance(found, float):
            differences[name] = found
            if found <= probe.tolerance:
                continue
            found = f"{_FOUND[name]} (relative difference {found:.1e})"
        reason = found
        causal_lm.run_unpacked()
    notes: list[str] = []
    if reason is not None:
        notes.append(f"{reason}; it runs one path at a time, with its own attention")
    noisy = probe.noisy()
    if noisy:
        notes.append("the model draws random numbers in training; layouts agree on average only")
    return SelfTest(
        causal_lm.unpacked, differences, probe.tolerance, noisy, tuple(notes), causal_lm.logits
    )


_REFUSED = {
    "head": "the model makes its logits from its hidden states in a way that is not known here",
    "causal": "the model's hidden states depend on later tokens, so it is no causal language model",
}
_FOUND = {
    "packed": "this model gives other results where documents are packed",
    "tree": "this model gives other results where documents share a prefix",
    "neighbour": "this model's position encoding depends on the longest document in a call",
}


def _measure(check: Callable[[], float]) -> float | str:
    """The difference, or why there is none."""
    try:
        return check()
    except ModelError as error:
        return error.message
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        return f"the model does not take packed documents: {type(error).__name__}: {first[:120]}"
