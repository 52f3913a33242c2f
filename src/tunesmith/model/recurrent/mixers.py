"""Recurrent modules whose recurrence is written inside them, known by their parts.

- Lightning attention (MiniMax-01, arXiv 2501.08313).
- RG-LRU (Griffin, arXiv 2402.19427): the recurrence, and the convolution before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tunesmith.model.recurrent.active_layout import active_layout
from tunesmith.model.recurrent.convolution import path_convolution
from tunesmith.model.recurrent.handover import State, run_over_tree
from tunesmith.model.recurrent.levels import run_tree
from tunesmith.model.recurrent.linear_scan import decayed_attention, diagonal_scan
from tunesmith.module_swap import ModuleSwap
from tunesmith.types import Layout


@dataclass(frozen=True, slots=True)
class KnownMixer:
    """A kind of module with its parts, and which of them are swapped how."""

    parts: frozenset[str]
    swap_parts: Callable[[Any, ModuleSwap], None]

    def swap(self, module: nn.Module, swap: ModuleSwap) -> None:
        """Swap what follows layouts, if the module is of this kind."""
        if self.parts <= {*module._modules, *module._parameters, *module._buffers}:
            self.swap_parts(module, swap)


def _lightning(module: Any, swap: ModuleSwap) -> None:
    original = type(module).forward

    def forward(self: Any, hidden_states: Tensor, *inputs: Any, **named: Any) -> Any:
        layout = active_layout()
        if layout is None:
            return original(self, hidden_states, *inputs, **named)
        return lightning_attention(self, hidden_states, layout), None

    swap.set_forward(module, forward)


def lightning_attention(module: Any, hidden: Tensor, layout: Layout) -> Tensor:
    """What MiniMax's lightning attention computes of hidden states [1, T, D]."""
    heads, size = module.num_attention_heads, module.head_dim
    mixed = module.act_fn(module.qkv_proj(hidden))[0].view(-1, heads, 3 * size)
    slope = module.slope_rate.float().view(1, heads)

    def recurrence(inputs: Sequence[Tensor], initial: State | None) -> tuple[Tensor, State]:
        start = None if initial is None else initial[0]
        output, final = decayed_attention(*inputs, initial=start, chunk=module.block_size)
        return output, (final,)

    inputs = [*mixed.split(size, -1), -slope.expand(len(mixed), -1)]
    output = run_over_tree(run_tree(layout, hidden.device), recurrence, inputs)
    normed = module.norm(output.flatten(1)[None])
    return module.out_proj(F.sigmoid(module.output_gate(hidden)) * normed)


def _griffin(block: Any, swap: ModuleSwap) -> None:
    original = type(block.conv_1d).forward

    def convolve(self: nn.Conv1d, inputs: Tensor) -> Tensor:
        layout = active_layout()
        if layout is None:
            return original(self, inputs)

        def whole(hidden: Tensor) -> Tensor:
            return original(self, hidden)[..., : hidden.shape[-1]]

        return path_convolution(whole, layout, inputs, self.weight[:, 0], self.bias)

    swap.set_forward(block.conv_1d, convolve)
    swap.set_class(block.rg_lru, _following_lru(type(block.rg_lru)))


def _following_lru(original: type[nn.Module]) -> type[nn.Module]:
    def scan(
        self: Any, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        layout = active_layout()
        if layout is None:
            rest = {"recurrent_gate": recurrent_gate, "reset": reset, **named}
            return original._rnn_scan(self, hidden_states=hidden_states, **rest)  # pyright: ignore

        def recurrence(inputs: Sequence[Tensor], initial: State | None) -> tuple[Tensor, State]:
            output, final = diagonal_scan(*inputs, initial=None if initial is None else initial[0])
            return output, (final,)

        decay = (recurrent_gate * ~reset)[0].float()
        tree = run_tree(layout, decay.device)
        inputs = [decay, hidden_states[0].float()]
        output = run_over_tree(tree, recurrence, inputs, padding=(1.0, 0.0))
        return output[None].to(hidden_states.dtype), None

    return type(original.__name__, (original,), {"_rnn_scan": scan})


MIXERS = (
    KnownMixer(
        frozenset({"qkv_proj", "output_gate", "out_proj", "norm", "slope_rate"}), _lightning
    ),
    KnownMixer(frozenset({"conv_1d", "rg_lru"}), _griffin),
)
