"""Fused kernels for norms and gated units, used where a trial shows them exact."""

from tunesmith.model.kernels.provider import NAME, Provider, find_liger
from tunesmith.model.kernels.replace import Replaced, restore_modules, use_kernels

__all__ = ["NAME", "Provider", "Replaced", "find_liger", "restore_modules", "use_kernels"]
