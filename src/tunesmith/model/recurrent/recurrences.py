"""The functions that recurrent mixers of transformers call, made to follow a layout.

Each takes the layout and transformers' function in torch operations, and returns what is called in
its place with the same arguments. Transformers' function computes the runs of a level as one batch.
A layout is one row of tokens, so B = 1 outside.

- Gated delta rule (arXiv 2412.06464) and Kimi delta attention (arXiv 2510.26692): a padded step has
  beta = 0 and log decay 0.
- State-space duality (Mamba 2, arXiv 2405.21060) and selective scan (Mamba 1, arXiv 2312.00752): a
  padded step has step size 0, which is a decay of 1 and no input.

Letters: T tokens, S runs, n steps, H heads, I channels, N size of a channel's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tunesmith.model.recurrent.convolution import path_convolution
from tunesmith.model.recurrent.handover import State, run_over_tree
from tunesmith.model.recurrent.levels import run_tree
from tunesmith.types import Layout

Original = Callable[..., Any]
"""A function of transformers."""


def causal_convolution(layout: Layout, original: Original) -> Original:
    """For `causal_conv1d_fn`: inputs [1, C, T], weight [C, W]."""
    from transformers.activations import ACT2FN

    def convolve(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **_: Any,
    ) -> Tensor:
        def whole(inputs: Tensor) -> Tensor:
            return original(inputs, weight, bias, activation=activation)

        activate = None if activation is None else ACT2FN[activation]
        return path_convolution(whole, layout, hidden_states, weight, bias, activate)

    return convolve


def delta_rule(layout: Layout, original: Original) -> Original:
    """For `torch_chunk_gated_delta_rule` and `chunk_kimi_delta_attention`: inputs [1, T, H, ...];
    returns outputs and no final state.
    """

    def rule(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        def recurrence(inputs: Sequence[Tensor], initial: State | None) -> tuple[Tensor, State]:
            q, k, v, decay, rate = inputs
            output, final = original(
                q,
                k,
                v,
                g=decay,
                beta=rate,
                initial_state=None if initial is None else initial[0],
                output_final_state=True,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                chunk_size=_chunk(q, 64),
            )
            return output, (final,)

        inputs = [each[0] for each in (query, key, value, g, beta)]
        return run_over_tree(run_tree(layout, query.device), recurrence, inputs)[None], None

    return rule


def state_space_dual(layout: Layout, original: Original) -> Original:
    """For `mamba2_chunk_scan`: inputs [1, T, H, ...], dt [1, T, H]."""

    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        **_: Any,
    ) -> Tensor:
        # here and not inside: bias and limits would make the step size of a padded step positive
        dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
        dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)

        def recurrence(inputs: Sequence[Tensor], initial: State | None) -> tuple[Tensor, State]:
            x, step, b, c = inputs
            output, final = original(
                x,
                step,
                A,
                b,
                c,
                chunk_size=_chunk(x, chunk_size),
                D=D,
                initial_states=None if initial is None else initial[0],
                return_final_states=True,
            )
            return output, (final,)

        inputs = [each[0] for each in (hidden_states, dt, B, C)]
        return run_over_tree(run_tree(layout, dt.device), recurrence, inputs)[None]

    return scan


def selective_scan(layout: Layout, original: Original) -> Original:
    """For `mamba_selective_scan`: inputs [1, I, T], B and C [1, N, T], A [I, N].

    It takes no initial state. The recurrence is linear, so what the initial state adds to the
    outputs is added to them afterwards.
    """

    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        **options: Any,
    ) -> Tensor:
        dt = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        dt = F.softplus(dt) if delta_softplus else dt
        options = {key: value for key, value in options.items() if key.startswith("use_")}

        def recurrence(inputs: Sequence[Tensor], initial: State | None) -> tuple[Tensor, State]:
            x, step, b, c = inputs  # [S, n, ...]
            rows = [each.transpose(1, 2) for each in (x, step, b, c)]
            output, final = original(
                rows[0], rows[1], A, *rows[2:], return_last_state=True, **options
            )
            output = output.transpose(1, 2)
            if initial is not None:
                # decay from the start of the run to each of its steps, [S, n, I, N]
                kept = torch.exp(A.float() * step.float().cumsum(1)[..., None])
                output = output + torch.einsum("snid,sid,snd->sni", kept, initial[0], c.float())
                final = final + kept[:, -1] * initial[0]
            return output.to(x.dtype), (final,)

        inputs = [each[0].transpose(0, 1) for each in (hidden_states, dt, B, C)]
        tree = run_tree(layout, dt.device)
        output = run_over_tree(tree, recurrence, inputs).transpose(0, 1)[None]
        if D is not None:
            output = output + hidden_states * D[None, :, None]
        return output if z is None else output * F.silu(z)

    return scan


def no_fused_kernel(layout: Layout, original: Original) -> Original:
    """For fused kernels of a whole mixer, which know no layout: None is transformers' word for
    "there is none", after which a mixer calls the functions above.
    """
    return lambda *_, **__: None


def _chunk(inputs: Tensor, most: int) -> int:
    """The chunk of a chunked recurrence, no longer than the longest run: steps that fill up a chunk
    are computed too. It changes nothing else.
    """
    return min(most, inputs.shape[1])


RECURRENCES: dict[str, Callable[[Layout, Original], Original]] = {
    "causal_conv1d_fn": causal_convolution,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": state_space_dual,
    "mamba2_split_conv1d_scan_combined": no_fused_kernel,
    "mamba_split_conv1d_scan_combined": no_fused_kernel,
    "mamba_selective_scan": selective_scan,
    "mamba_inner_fn": no_fused_kernel,
}
"""By the name under which a mixer's `forward` finds the function in its module."""
