"""Recurrences in elementary operations, for models whose own function takes no initial state.

A padded step must not change the state: its decay is 1 and its input 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def diagonal_scan(decay: Tensor, inflow: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_t = decay_t * h_(t-1) + inflow_t over dimension 1; returns all states and the last one."""
    state = torch.zeros_like(inflow[:, 0]) if initial is None else initial
    states: list[Tensor] = []
    for each_decay, each_inflow in zip(decay.unbind(1), inflow.unbind(1), strict=True):
        state = each_decay * state + each_inflow
        states.append(state)
    return torch.stack(states, 1), state


def decayed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    *,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Linear attention with a decay per step, S_t = exp(log_decay_t) S_(t-1) + k_t v_t^T and
    o_t = q_t S_t, in chunks (lightning attention, arXiv 2401.04658).

    Shapes: query, key and value [S, n, H, D], log_decay [S, n, H]; the state is [S, H, D, D].
    """
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    log_decay = log_decay.transpose(1, 2)
    state = initial
    if state is None:
        state = value.new_zeros(*key.shape[:2], key.shape[-1], value.shape[-1])
    outputs: list[Tensor] = []
    for q, k, v, log in zip(
        *(each.split(chunk, 2) for each in (query, key, value, log_decay)), strict=True
    ):
        since_start = log.cumsum(-1)
        between = since_start[..., :, None] - since_start[..., None, :]
        later = torch.ones_like(between, dtype=torch.bool).triu(1)
        weights = (q @ k.transpose(-1, -2)) * between.masked_fill(later, -torch.inf).exp().to(q)
        outputs.append(weights @ v + (q * since_start.exp()[..., None].to(q)) @ state)
        to_end = (since_start[..., -1:] - since_start).exp()[..., None].to(k)
        kept = since_start[..., -1].exp()[..., None, None].to(state)
        state = kept * state + (k * to_end).transpose(-1, -2) @ v
    return torch.cat(outputs, 2).transpose(1, 2), state
