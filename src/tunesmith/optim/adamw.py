"""AdamW (arXiv 1711.05101) on float32 masters, and with 8-bit moments (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunesmith.optim.optimizer import Optimizer, ParamState


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019) on float32 masters.

    A bfloat16 weight takes 2 + 2 + 8 bytes with its two moments.

    Args:
        named_parameters: what is trained.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        shared: arguments of `Optimizer`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **shared: Any,
    ) -> None:
        self.betas = betas
        self.eps = eps
        super().__init__(named_parameters, **shared)

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """Two moments."""
        return {"exp_avg": self.zeros(param), "exp_avg_sq": self.zeros(param)}

    def rule(
        self,
        param: ParamState,
        span: slice,
        *,
        master: Tensor,
        grad: Tensor,
        lr: float,
        counter: Tensor,
    ) -> None:
        """One step of Adam."""
        moments = param.state["exp_avg"][span], param.state["exp_avg_sq"][span]
        self.adam(master, grad, moments, lr=lr, decay=self.decay(param), counter=counter)

    def adam(
        self,
        master: Tensor,
        grad: Tensor,
        moments: tuple[Tensor, Tensor],
        *,
        lr: float,
        decay: float,
        counter: Tensor,
    ) -> None:
        """torch's fused update of `master` and both moments, all float32 [n]."""
        torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
            [master],
            [grad],
            [moments[0]],
            [moments[1]],
            [],
            [counter],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )


BLOCK = 256
"""Elements that share a scale in 8 bits."""
SMALL = 4096
"""Parameters below this many elements keep float32 moments."""


class AdamW8bit(AdamW):
    """AdamW whose moments rest in 8 bits (Dettmers et al., arXiv 2110.02861).

    Between steps a moment is one byte an element, an entry of `dynamic_map`, and a float32 scale
    per block of 256; each step reads it into float32, updates, and rounds to the nearest entry.
    Parameters of fewer than 4096 elements keep float32 moments.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], **options: Any) -> None:
        self._maps: dict[tuple[str, torch.device], Tensor] = {}
        super().__init__(named_parameters, **options)

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """For both moments the bytes and the scales of their blocks."""
        if param.flat.numel() < SMALL:
            return super().new_state(name, param)
        state: dict[str, Tensor] = {}
        for kind in ("exp_avg", "exp_avg_sq"):
            flat = param.flat
            block = torch.zeros(BLOCK, device=flat.device)
            entries, scale = quantize(block, self._map(kind, flat.device))
            numbers = entries[:1].expand(flat.numel()).contiguous()
            state[kind] = numbers if self.pages is None else self.pages.paged(numbers)
            state[f"{kind}_scale"] = scale.expand(-(-flat.numel() // BLOCK)).contiguous()
        return state

    def can_group(self, param: ParamState) -> bool:
        """Unless a block would reach into the next parameter."""
        return "exp_avg_scale" not in param.state or param.flat.numel() % BLOCK == 0

    def rule(
        self,
        param: ParamState,
        span: slice,
        *,
        master: Tensor,
        grad: Tensor,
        lr: float,
        counter: Tensor,
    ) -> None:
        """One step of Adam on the moments read from 8 bits."""
        if "exp_avg_scale" not in param.state:
            super().rule(param, span, master=master, grad=grad, lr=lr, counter=counter)
            return
        blocks = slice(span.start // BLOCK, -(-span.stop // BLOCK))
        kinds = ("exp_avg", "exp_avg_sq")
        maps = [self._map(kind, master.device) for kind in kinds]
        first, second = (
            dequantize(param.state[kind][span], param.state[f"{kind}_scale"][blocks], entries)
            for kind, entries in zip(kinds, maps, strict=True)
        )
        self.adam(master, grad, (first, second), lr=lr, decay=self.decay(param), counter=counter)
        for kind, moment, entries in zip(kinds, (first, second), maps, strict=True):
            quantized, scale = quantize(moment, entries)
            param.state[kind][span].copy_(quantized)
            param.state[f"{kind}_scale"][blocks].copy_(scale)

    def _map(self, kind: str, device: torch.device) -> Tensor:
        if (kind, device) not in self._maps:
            self._maps[kind, device] = dynamic_map(signed=kind == "exp_avg").to(device)
        return self._maps[kind, device]


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 numbers of the dynamic 8-bit type, rising, float32: 0, 1, and for each of seven
    powers of ten down from 1 the middles of equal parts of [0.1, 1] times it, twice as many for
    each power.
    """
    numbers = [0.0, 1.0]
    for power in range(7):
        parts = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)).tolist()
        numbers += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)


def quantize(values: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Of `values` [n] the uint8 number of the nearest of `entries` [256] after division by the
    largest magnitude of each block, and these magnitudes, float32 [ceil(n / 256)].
    """
    missing = -values.numel() % BLOCK
    blocks = torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    shares = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    nearest = torch.bucketize(shares, (entries[1:] + entries[:-1]) / 2, out_int32=True)
    return nearest.to(torch.uint8).view(-1)[: values.numel()], scale


def dequantize(numbers: Tensor, scale: Tensor, entries: Tensor) -> Tensor:
    """float32 [n] of what `quantize` gave."""
    scales = scale.repeat_interleave(BLOCK)[: numbers.numel()]
    return entries[numbers.int()].mul_(scales)
