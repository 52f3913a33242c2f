"""A model whose layers are divided over neighbouring ranks, by what a plan says of its linear maps.

A rank's parameters are plain tensors: of a divided map its part, and everything else whole. After
a step's backward passes the gradient of a divided map is that of this copy's micro-batches, to be
added up over the ranks with the same part. Of what is whole each rank has either the whole
gradient, of which one rank's is taken, or a term of it: the head's from its own targets, a norm's
from its own heads. So one sum over all ranks makes those whole, and the same bits everywhere (P3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.distributed.grad_sync import Parted
from tunesmith.distributed.tensor_parallel_ops import Seams, Split
from tunesmith.distributed.world import World

COPY, PART = "copy", "part"


@dataclass(frozen=True, slots=True)
class Division:
    """Which modules of a model are divided."""

    columns: Sequence[nn.Module]  # linear maps of which each rank has some outputs
    rows: Sequence[nn.Module]  # of which it has some inputs
    divided: Sequence[tuple[Tensor, int]]  # their parameters, and along which dimension
    termed: Sequence[nn.Module]  # whole, and each rank has a term of their gradients
    embedding: nn.Module

    def dimension(self, parameter: Tensor) -> int | None:
        """Along which the parameter is divided; None if it isn't."""
        return next((n for other, n in self.divided if other is parameter), None)

    def places(self, root: nn.Module) -> dict[str, int | None]:
        """The same for all parameters of `root`, by name."""
        found = {id(parameter): n for parameter, n in self.divided}
        return {name: found.get(id(p)) for name, p in root.named_parameters()}

    def terms(self, root: nn.Module) -> set[str]:
        """Names of the parameters of whose gradients each rank has a term."""
        found = {id(p) for module in self.termed for p in module.parameters()}
        return {name for name, p in root.named_parameters() if id(p) in found}


def divide(division: Division, split: Split) -> Seams:
    """Cut the maps down to this rank's part, in place, and let the ranks meet around them.

    The final hidden states are still to be led through `Seams.enter` by whoever goes on with them.
    """
    seams = Seams(split)
    for parameter, dimension in division.divided:
        part = parameter.detach().chunk(split.count, dimension)[split.place]
        parameter.data = part.clone(memory_format=torch.contiguous_format)
    for module in division.columns:
        module.forward = partial(_column, seams, module)
    for module in division.rows:
        module.forward = partial(_row, seams, module)
    division.embedding.forward = partial(_alike, seams, division.embedding)
    return seams


def _column(seams: Seams, module: nn.Module, whole: Tensor) -> Tensor:
    return type(module).forward(module, seams.enter(whole))


def _row(seams: Seams, module: Any, part: Tensor) -> Tensor:
    """The bias comes once, on top of the sum."""
    own = getattr(module, "base_layer", module)._parameters
    bias, own["bias"] = own["bias"], None
    try:
        term = type(module).forward(module, part)
    finally:
        own["bias"] = bias
    whole = seams.leave(term)
    return whole if bias is None else whole + bias


def _alike(seams: Seams, module: nn.Module, ids: Tensor) -> Tensor:
    return seams.only_first(type(module).forward(module, ids))


def divide_model(
    root: nn.Module, division: Division, ranks: World, device: torch.device
) -> Divided:
    """Divide `root`, which every rank has with the same weights, and move it to its device."""
    seams = divide(division, ranks.split)
    root.to(device)
    return Divided(ranks, root, division, seams)


class Divided(Parted):
    """Every rank has its part of each divided map, and everything else."""

    def __init__(self, ranks: World, root: nn.Module, division: Division, seams: Seams) -> None:
        self._root, self._division, self._seams = root, division, seams
        self._places, self._termed = division.places(root), division.terms(root)
        self._named: dict[str, nn.Parameter] = dict(root.named_parameters())
        trained = {n: p for n, p in self._named.items() if p.requires_grad}
        super().__init__(ranks, _placed(trained, self._places, ranks), dict(trained))

    @property
    def share(self) -> float:
        """Of the whole model's parameters those that are divided."""
        sizes = {n: (p.numel(), self._places[n] is not None) for n, p in self._named.items()}
        divided = self._ranks.split.count * sum(size for size, cut in sizes.values() if cut)
        return divided / (divided + sum(size for size, cut in sizes.values() if not cut))

    @property
    def seams(self) -> Seams:
        """Where the model's ranks meet."""
        return self._seams

    def forget(self) -> None:
        """Hold no activation of the last pass."""
        self._seams.forget()

    def _trained(self, *, divided: bool) -> list[Tensor]:
        return [p for n, p in self.parts.items() if (self._places[n] is not None) == divided]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Every rank has the same gradients of what is whole afterwards, to the bit."""
        self._seams.forget()
        split = self._ranks.split
        if split.place > 0:
            for name, parameter in self.parts.items():
                if self._places[name] is None and name not in self._termed:
                    parameter.grad = None  # the first one's counts
        self.add_up(self._trained(divided=False))
        if self._ranks.groups > 1:
            self.add_up(self._trained(divided=True), group=split.alike)

    @torch.no_grad()
    def norm(self, own: Tensor) -> Tensor:
        """The norm of the whole gradient: each part's squares, and once those of what is whole."""
        whole, parts = (_square(self._trained(divided=kind), own) for kind in (False, True))
        with self._ranks.guarded():
            return (whole + self._ranks.split.add(parts)).sqrt().float()

    @torch.no_grad()
    def gather(self) -> None:
        """As `Parted.gather`; the first rank's copy of the layers is taken."""
        import torch.distributed as dist

        split = self._ranks.split
        if self._ranks.own_group > 0:
            return
        for name, parameter in self._named.items():
            dimension = self._places[name]
            if dimension is not None:
                parts = [torch.empty_like(parameter) for _ in range(split.count)]
                with self._ranks.guarded():
                    dist.all_gather(parts, parameter.detach().contiguous(), group=split.group)
                if split.place == 0:
                    parameter.grad = None
                    parameter.data = torch.cat([part.cpu() for part in parts], dimension)
        if split.place == 0:
            self._root.to("cpu")
            division = self._division
            for module in (*division.columns, *division.rows, division.embedding):
                del module.forward


def _square(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of squares of their gradients, float64."""
    grads = [t.grad for t in tensors if t.grad is not None]
    if not grads:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    return torch.stack([g.float().norm().double().square() for g in grads]).sum()


def _placed(
    trained: Mapping[str, Tensor], places: Mapping[str, int | None], ranks: World
) -> dict[str, Any]:
    """What each trained parameter is a part of, without contents."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

    split = ranks.split
    mesh = DeviceMesh.from_group(
        [split.alike, split.group],
        next(iter(trained.values())).device.type,
        mesh=torch.arange(ranks.size).view(-1, split.count),
        mesh_dim_names=(COPY, PART),
    )
    found: dict[str, Any] = {}
    for name, parameter in trained.items():
        dimension = places[name]
        shape = list(parameter.shape)
        place: Placement = Replicate()
        if dimension is not None:
            shape[dimension] *= split.count
            place = Shard(dimension)
        whole = torch.empty(shape, device="meta")
        found[name] = DTensor.from_local(
            torch.empty(parameter.shape, device="meta"), mesh, [Replicate(), place],
            run_check=False, shape=whole.shape, stride=whole.stride(),
        )  # fmt: skip
    return found
