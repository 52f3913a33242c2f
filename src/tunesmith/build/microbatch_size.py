"""Micro-batch size and activation checkpointing: as the recipe says, or fitted to the free
memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tunesmith.checkpoint.rng import capture_rng, restore_rng
from tunesmith.config.schema import Recipe
from tunesmith.data.microbatch.planner import plan_step
from tunesmith.distributed.oom import is_out_of_memory
from tunesmith.errors import InputError
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.memory.activations import (
    MODES,
    Cost,
    MicroChoice,
    choose_micro_tokens,
    computed_cost,
    tokens_range,
)
from tunesmith.model.memory.allocator import footprint
from tunesmith.model.memory.estimate import MemoryEstimate
from tunesmith.model.ops.activation_checkpointing import (
    Mode,
    as_mode,
    checkpointed_layers,
    set_checkpointing,
)
from tunesmith.objectives import head_loss, nll
from tunesmith.train.microbatches import collate
from tunesmith.types import Batch, Document, Origin, Segment

PROBED_TOKENS = 512
"""Tokens of the longest document that a probe runs."""
AMPLE = 4.0
"""On a CPU, where a probe takes seconds, none is made if so many times the formula's bytes fit."""


def choose_micro_batch(
    recipe: Recipe,
    model: CausalLM,
    device: torch.device,
    *,
    longest: int,
    room: int,
    held: MemoryEstimate | None,
    probes: bool = True,
) -> MicroChoice:
    """Tokens at a time, and how activations are recomputed: as asked, or as room requires.

    `room`: bytes that were free before the model was loaded, of which it takes `held`. `probes`:
    whether what a token takes may be measured.

    Raises:
        InputError: activations are to be offloaded from a CPU.
        ModelError: the architecture can't recompute, and was asked to.
    """
    if recipe.device.activation_offload and device.type == "cpu":
        raise InputError(
            "on a CPU activations are in the host's memory already",
            where="device.activation_offload",
            hint="device.activation_offload=false, or device.gradient_checkpointing=layers",
        )
    asked, wanted = recipe.device.gradient_checkpointing, recipe.device.micro_tokens
    modes: list[Mode] = list(_possible(model)) if asked == "auto" else [as_mode(asked)]
    if recipe.device.compile != "none" and len(modes) > 1:
        modes.remove("selective")  # it looks at operations, which compiled layers don't have
    left = max(room - (held.total if held else 0), room // 8)
    dtype = model.head.weight.dtype
    cost = computed_cost(model.config, dtype=dtype)
    needed = longest if wanted == "auto" else max(longest, wanted)
    open_choice = wanted == "auto" or len(modes) > 1
    if probes and open_choice and _matters(cost(modes[0]), device, needed=needed, room=left):
        offload = recipe.device.activation_offload
        cost = measured_cost(model, device, longest=longest, offload=offload)
    choice = choose_micro_tokens(cost, device=device, room=left, longest=needed, modes=modes)
    set_checkpointing(model.decoder, choice.checkpointing)
    if wanted == "auto":
        return choice
    return MicroChoice(wanted, choice.checkpointing, choice.reason)


def measured_cost(
    model: CausalLM, device: torch.device, *, longest: int, offload: bool = False
) -> Callable[[Mode], Cost]:
    """The cost of each mode in a micro-batch whose longest path has `longest` tokens, from the
    memory that forward and backward of short documents take.

    Bytes of n tokens are c + a n + b n^2, the last for attention that holds its scores; c, a and b
    are solved for from three lengths. Gradients, which stay, are there before and not counted.
    Weights, gradients and the random generators are left as they were.
    """
    top = max(4, min(longest, PROBED_TOKENS))
    sizes = (max(2, top // 8), max(3, top // 2), top)

    @functools.cache
    def cost(mode: Mode) -> Cost:
        state, training = capture_rng(), model.training
        try:
            set_checkpointing(model.decoder, mode)
            model.train()
            _bytes_of(model, sizes[0], device, offload=offload)  # makes the gradients
            seen = [_bytes_of(model, size, device, offload=offload) for size in sizes]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return Cost(math.inf, measured=True)
        finally:
            model.zero_grad(set_to_none=True)
            model.train(training)
            restore_rng(state)
        return _fitted(sizes, seen, longest)

    return cost


def _fitted(sizes: Sequence[int], seen: Sequence[int], longest: int) -> Cost:
    """The cost at `longest` of the parabola through what was seen; a line where it bends down."""
    n, y = np.asarray(sizes, np.float64), np.asarray(seen, np.float64)
    fixed, linear, square = np.linalg.solve(np.vander(n, 3, increasing=True), y)
    if square < 0 or fixed < 0:
        square = 0.0
        linear = (y[2] - y[0]) / (n[2] - n[0])
        fixed = max(0.0, y[2] - linear * n[2])
    per_token = max(float(linear + square * longest), 1.0)
    return Cost(per_token, fixed=float(fixed), measured=True)


def _bytes_of(model: CausalLM, tokens: int, device: torch.device, *, offload: bool = False) -> int:
    """The most that a document of so many tokens, all targets, takes until its gradients are
    there.
    """
    batch = made_up_batch(model, tokens, device)
    with footprint(device) as seen:
        head = functools.partial(head_loss, objective=nll)
        model(batch, head, offload=offload).loss_sum.backward()
    return seen.peak


def made_up_batch(model: CausalLM, tokens: int, device: torch.device) -> Batch:
    """A document of so many tokens, all targets."""
    vocabulary = int(model.head.weight.shape[0])
    ids = np.linspace(0, vocabulary - 1, tokens).astype(np.int32)
    index = np.arange(1, tokens, dtype=np.int32)
    segment = Segment(
        ids, -1, 0, index, np.ones(len(index), np.float32), np.zeros(len(index), np.int32)
    )
    document = Document((segment,), Origin("probe", 0))
    (plan,) = plan_step([document], micro_tokens=tokens, unpacked=model.unpacked)
    return collate(plan, device)


def _possible(model: CausalLM) -> tuple[Mode, ...]:
    """The modes that `auto` may take: the first alone where the architecture can't recompute."""
    decoder: Any = model.decoder
    able = checkpointed_layers(decoder) and decoder.supports_gradient_checkpointing
    return MODES if able else MODES[:1]


def _matters(cost: Cost, device: torch.device, *, needed: int, room: int) -> bool:
    """Whether a measurement could change the choice, and can be made."""
    if device.type not in ("cpu", "cuda"):
        return False
    most = max(needed, tokens_range(device)[1])
    return device.type == "cuda" or cost.tokens(room) < AMPLE * most
