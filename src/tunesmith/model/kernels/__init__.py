"""Fused kernels for a model's own norms and gated units, where a trial shows them right."""

from tunesmith.model.kernels.provider import NAME, Provider, find_liger
from tunesmith.model.kernels.replace import Replaced, restore_modules, use_kernels

__all__ = ["NAME", "Provider", "Replaced", "find_liger", "restore_modules", "use_kernels"]
