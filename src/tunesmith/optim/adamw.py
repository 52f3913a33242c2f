"""AdamW (arXiv 1711.05101) on float32 masters, and with 8-bit moments (arXiv 2110.02861)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tunesmith.optim.optimizer import Optimizer, ParamState


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) on float32 master weights.

    With its master and two moments a bfloat16 weight takes 2 + 2 + 8 bytes.

    Args:
        named_parameters: the trained parameters.
        betas: decay rates of the two moments.
        eps: added to the square root of the second moment.
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
        """The first and second moment, exp_avg and exp_avg_sq [n]."""
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
        """One AdamW step on a chunk."""
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
        """torch's fused AdamW kernel on `master` and both moments, all float32 [n]."""
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
"""Elements of a quantization block, which share a scale."""
SMALL = 4096
"""Parameters below this many elements keep float32 moments."""


class AdamW8bit(AdamW):
    """AdamW with block-wise quantized 8-bit moments (Dettmers et al., 2022, arXiv 2110.02861).

    Between steps a moment is one byte per element, an index into `dynamic_map`, and a float32 scale
    per block of 256 elements. Each step dequantizes to float32, updates, and rounds to the nearest
    entry. Parameters below 4096 elements keep float32 moments.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], **options: Any) -> None:
        self._maps: dict[tuple[str, torch.device], Tensor] = {}
        super().__init__(named_parameters, **options)

    def new_state(self, name: str, param: ParamState) -> dict[str, Tensor]:
        """For each moment its bytes [n] and the scales of its blocks [ceil(n / 256)]."""
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
        """False if a quantization block would reach into the next parameter."""
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
        """One AdamW step on a chunk, with dequantized moments that are quantized again after it."""
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
    """The 256 values of the dynamic 8-bit data type (arXiv 2110.02861), ascending, float32 [256].

    They are 0, 1, and for each power of ten from 1e-6 to 1 the midpoints of equal parts of
    [0.1, 1] times that power, with twice as many parts for each next power; `signed` has these
    with both signs and half as many of each.
    """
    numbers = [0.0, 1.0]
    for power in range(7):
        parts = 2**power if signed else 2 ** (power + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        middles = ((edges[1:] + edges[:-1]) / 2 * 10.0 ** (power - 6)).tolist()
        numbers += middles + ([-middle for middle in middles] if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)


def quantize(values: Tensor, entries: Tensor) -> tuple[Tensor, Tensor]:
    """Block-wise quantization of `values` [n]: uint8 indices [n] and float32 scales [ceil(n /
    256)].

    A block's scale is its largest magnitude. A value's index is that of the nearest of `entries`
    [256] after division by the scale.
    """
    missing = -values.numel() % BLOCK
    blocks = torch.nn.functional.pad(values, (0, missing)).view(-1, BLOCK)
    scale = blocks.abs().amax(dim=1)
    scaled = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    nearest = torch.bucketize(scaled, (entries[1:] + entries[:-1]) / 2, out_int32=True)
    return nearest.to(torch.uint8).view(-1)[: values.numel()], scale


def dequantize(numbers: Tensor, scale: Tensor, entries: Tensor) -> Tensor:
    """The float32 values [n] of indices and scales that `quantize` returned."""
    scales = scale.repeat_interleave(BLOCK)[: numbers.numel()]
    return entries[numbers.int()].mul_(scales)
