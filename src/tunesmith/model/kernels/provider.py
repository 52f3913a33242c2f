"""Liger kernels (arXiv 2410.10989) for norms and gated units. Only kernels that treat each token by
itself are taken; loss and attention are ours.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from torch import Tensor

from tunesmith.errors import RecipeError, first_line

NAME = "liger"
KEY = "device.kernels"


@dataclass(frozen=True, slots=True)
class Provider:
    """Kernels with their own backward passes.

    `norm` takes (input, weight, eps, offset, casting): the root-mean-square norm times
    (weight + offset), what is in float32 given by the casting, "llama", "gemma" or "none".
    `gates` take (gate, up): an activation of the gate, by name, times what goes up.
    """

    name: str
    norm: Callable[[Tensor, Tensor, float, float, str], Tensor]
    gates: dict[str, Callable[[Tensor, Tensor], Tensor]]


def find_liger(*, insist: bool) -> Provider | None:
    """Liger's kernels; None where they are not installed and nobody insists.

    Raises:
        RecipeError: they are insisted on, and can't be imported.
    """
    missing = [name for name in ("liger_kernel", "triton") if find_spec(name) is None]
    if not missing:
        try:
            return _liger()
        except (ImportError, RuntimeError, AttributeError) as error:
            problem = first_line(error)
            raise RecipeError(
                f"Liger's kernels are installed and can't be imported: {problem}",
                where=KEY,
                hint=f"pip install -U liger-kernel, or {KEY}=torch",
            ) from error
    if not insist:
        return None
    raise RecipeError(
        f"Liger's kernels need {' and '.join(missing)}, not installed here",
        where=KEY,
        hint=f"pip install 'tunesmith[cuda]', or {KEY}=auto",
    )


def _liger() -> Provider:
    from liger_kernel.ops.geglu import (  # pyright: ignore[reportMissingImports]
        LigerGELUMulFunction,
    )
    from liger_kernel.ops.rms_norm import (  # pyright: ignore[reportMissingImports]
        LigerRMSNormFunction,
    )
    from liger_kernel.ops.swiglu import (  # pyright: ignore[reportMissingImports]
        LigerSiLUMulFunction,
    )

    def norm(input: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
        # its default writes the gradient over the one that comes in, which others may still read
        return LigerRMSNormFunction.apply(input, weight, eps, offset, casting, False)

    return Provider(
        f"Liger {importlib.metadata.version('liger-kernel')}",
        norm,
        {"silu": LigerSiLUMulFunction.apply, "gelu_tanh": LigerGELUMulFunction.apply},
    )
