"""Adapters with peft: LoRA and its kin, their targets, and what is trained."""

from tunesmith.model.adapters.add import (
    AttachedAdapter,
    adapted_names,
    adapter_fields,
    add_adapter,
    has_adapter,
    load_adapter,
    refuse_plain_base,
)
from tunesmith.model.adapters.initialization import began_quantized, save_adapter
from tunesmith.model.adapters.kinds import AdapterSpec
from tunesmith.model.adapters.report import AdapterReport, freeze, full_report
from tunesmith.model.adapters.state import NO_ADAPTER, AdapterState
from tunesmith.model.adapters.targets import Candidates, candidates, expert_counts

__all__ = [
    "NO_ADAPTER",
    "AdapterReport",
    "AdapterSpec",
    "AdapterState",
    "AttachedAdapter",
    "Candidates",
    "adapted_names",
    "adapter_fields",
    "add_adapter",
    "began_quantized",
    "candidates",
    "expert_counts",
    "freeze",
    "full_report",
    "has_adapter",
    "load_adapter",
    "refuse_plain_base",
    "save_adapter",
]
