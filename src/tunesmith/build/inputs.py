"""Objects that a caller of the Python API passes instead of naming them in the recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunesmith.build.sources import Rows


@dataclass(slots=True)
class UserObjects:
    """Objects the caller brought instead of naming them in the recipe."""

    model: Any = None  # a transformers or peft model
    tokenizer: Any = None
    rows: Rows | None = None
    eval_rows: Rows | None = None
