"""What ranks that hold a model in parts have in common, however it is divided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tunesmith.distributed.grad_sync import Replicated
from tunesmith.distributed.world import Ranks


class Parted(Replicated):
    """Ranks of which each has a part of some weights, and whose optimizer works on that alone.

    Args:
        whole: what the parameters are parts of, by name, as tensors that know where; their contents
            are not looked at.
        parts: the trained parameters of this rank by name, plain tensors.
    """

    def __init__(self, ranks: Ranks, whole: Mapping[str, Any], parts: dict[str, Tensor]) -> None:
        super().__init__(ranks, [])
        self._whole = whole
        self.parts = parts

    @property
    def sharded(self) -> Parted:
        """Itself."""
        return self

    @property
    def ranks(self) -> Ranks:
        """Those that hold the parts."""
        return self._ranks

    def norm(self, own: Tensor) -> Tensor:
        """The norm of all parts' gradients, from that of this rank's."""
        raise NotImplementedError

    def drop_gradients(self) -> None:
        """Forget gradients that have not reached the parts."""

    def gather(self) -> None:
        """Give the first rank the whole model, in its own precision and the host's memory; the
        model of the others is of no more use.
        """
        raise NotImplementedError

    def spread(self, state: Mapping[str, Tensor], *, bare: bool = False) -> dict[str, Tensor]:
        """An optimizer's state over the parts as tensors that know their place in the whole.

        Keys are KIND.NAME; they share the memory of what is given, or `bare` have none.
        """
        from torch.distributed.tensor import DTensor

        found: dict[str, Tensor] = {}
        for key, tensor in state.items():
            whole = self._whole.get(key.partition(".")[2])
            if whole is None:
                found[key] = tensor
                continue
            found[key] = DTensor.from_local(
                tensor.to("meta") if bare else tensor,
                whole.device_mesh,
                whole.placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )
        return found

    def parts_of(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts of an optimizer's state; keys are KIND.NAME."""
        from torch.distributed.tensor import distribute_tensor

        found: dict[str, Tensor] = {}
        for key, tensor in whole.items():
            name = key.partition(".")[2]
            like = self._whole.get(name)
            if like is None:
                found[key] = tensor
                continue
            placed = distribute_tensor(
                tensor.to(self.parts[name].device),
                like.device_mesh,
                like.placements,
                src_data_rank=None,
            )
            found[key] = placed.to_local()
        return found
