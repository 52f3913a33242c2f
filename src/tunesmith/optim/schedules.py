"""Learning-rate schedules with warm-up, and default peak learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
    "exponential": lambda progress: 0.1**progress,
    "quarter_cosine": lambda progress: math.cos(0.5 * math.pi * progress),
}
"""Fraction of the peak learning rate by progress, from 0 (first step after the warm-up) to 1
(end).
"""


def schedule(
    name: str,
    *,
    lr: float,
    warmup_steps: int,
    total_steps: int,
    min_lr: float = 0.0,
    decay: float = 0.2,
) -> Callable[[int], float]:
    """The learning rate of each step, counted from 0.

    With W warm-up steps and T steps in total, step s < W has the rate lr * (s + 1) / (W + 1), so
    that the first step is not lost and step W is at the peak. From step W on the rate is
    lr * (min_lr + (1 - min_lr) * shape(x)) with x = (s - W) / (T - W), where shape(x) is

    cosine (1 + cos(pi x)) / 2, linear 1 - x, constant 1, exponential 0.1^x, quarter_cosine
    cos(pi x / 2), wsd (warm-up, stable, decay; arXiv 2404.06395) 1 until x = 1 - decay and then
    (1 - x) / decay. Steps beyond T keep the value at x = 1.

    Raises:
        KeyError: the name is neither wsd nor one of `SHAPES`.
    """
    shape = SHAPES[name] if name != "wsd" else lambda x: min(1.0, (1 - x) / decay)
    decay_steps = max(1, total_steps - warmup_steps)

    def rate(step: int) -> float:
        if step < warmup_steps:
            return lr * (step + 1) / (warmup_steps + 1)
        x = min(1.0, (step - warmup_steps) / decay_steps)
        return lr * (min_lr + (1 - min_lr) * shape(x))

    return rate


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Warm-up steps, given as a fraction of all steps (below 1) or as a number; rounded up."""
    steps = warmup * total_steps if warmup < 1 else warmup
    # 0.07 * 100 is 7.000000000000001, which must not become 8.
    return math.ceil(round(steps, 9))


def auto_lr(adapter_kind: str, parameters: int) -> float:
    """The default peak learning rate for an adapter kind and a model of this many parameters.

    2e-4 for adapters; for full fine-tuning 1e-4 below 0.5 billion parameters, 5e-5 below 3 billion,
    else 2e-5.
    """
    if adapter_kind != "none":
        return 2e-4
    if parameters < 500_000_000:
        return 1e-4
    return 5e-5 if parameters < 3_000_000_000 else 2e-5
