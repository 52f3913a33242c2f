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
"""Share of the peak learning rate at a progress from 0 (first step after the warm-up) to 1 (the
end).
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

    With W warm-up and T total steps, step s < W has lr * (s + 1) / (W + 1), so that the first step
    already learns and step W is the first and only one at the peak. From there on the rate is lr *
    shape((s - W) / (T - W)):

    cosine (1 + cos(pi x)) / 2, linear 1 - x, constant 1, exponential 0.1^x (a tenth at the end),
    quarter_cosine cos(pi x / 2), wsd 1 until x = 1 - decay and then (1 - x) / decay. Steps beyond
    T keep the value at x = 1. `min_lr` is the share of lr that a shape of 0 stands for: the rate is
    lr * (min_lr + (1 - min_lr) * shape).

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
    """Steps of a warm-up given as a share of all steps (below 1) or as a number of steps; a part
    counts as a whole.
    """
    steps = warmup * total_steps if warmup < 1 else warmup
    # 0.07 * 100 is 7.000000000000001, which must not become 8.
    return math.ceil(round(steps, 9))


def auto_lr(adapter_kind: str, parameters: int) -> float:
    """The peak learning rate for a way of training and a model of so many parameters.

    2e-4 for adapters; for full fine-tuning 1e-4 below 0.5 billion parameters, 5e-5 below 3 billion,
    else 2e-5.
    """
    if adapter_kind != "none":
        return 2e-4
    if parameters < 500_000_000:
        return 1e-4
    return 5e-5 if parameters < 3_000_000_000 else 2e-5
