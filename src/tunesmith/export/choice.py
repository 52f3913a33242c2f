"""`tunesmith.json`: the chat template choice that a model was trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError
from tunesmith.model.source import CHOICE_FILE


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """`template` is "own" (the chat template in the model's folder) or "none" (trained raw)."""

    template: str = "own"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def raw(self) -> bool:
        """True if the model was trained without a chat template."""
        return self.template == "none"


def read_choice(folder: Path) -> TemplateChoice | None:
    """The choice kept in a model folder, None where the folder was not written by us.

    Raises:
        ModelError: the file is there and can't be understood.
    """
    path = folder / CHOICE_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TemplateChoice(str(values["template"]), dict(values["template_kwargs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"can't be understood: {error}", where=str(path), hint="export the model again"
        ) from error
