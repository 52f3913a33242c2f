"""The keys of a peft adapter's file, held against those of the model that it is put on.

peft itself only warns: the base is then used as if there were no adapter, or with half of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError


def refuse_other_keys(model: Any, folder: Path) -> None:
    """Hold what is in `folder` against the peft model that it was loaded into.

    Raises:
        ModelError: the file lacks weights that the adapter has on this model, or has others.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    name = model.active_adapter
    found = set_peft_model_state_dict(
        model, load_peft_weights(str(folder), device="cpu"), adapter_name=name
    )
    missing = _missing(model, found.missing_keys, name)
    extra = [key.replace(f".{name}", "") for key in found.unexpected_keys]
    problems = [_listed("lacks", missing)] if missing else []
    problems += [_listed("holds other weights,", extra)] if extra else []
    if problems:
        raise ModelError(
            f"the adapter is not one of {type(model.get_base_model()).__name__} with the targets "
            f"in its adapter_config.json: its file {' and '.join(problems)}",
            where=str(folder),
            hint="it was trained on another class of this model, or its files are not of one run",
        )


def _missing(model: Any, keys: Sequence[str], name: str) -> list[str]:
    """Of the missing keys those of the adapter, but not what is another name of a loaded weight."""
    state = model.state_dict()
    absent = {key for key in keys if key in state and name in key.split(".")}
    if not getattr(model.peft_config[name], "save_projection", True):
        absent = {key for key in absent if ".vera_" not in key}  # drawn again from its seed
    there = {tensor.data_ptr() for key, tensor in state.items() if key not in absent}
    return sorted(k.replace(f".{name}", "") for k in absent if state[k].data_ptr() not in there)


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{what} {', '.join(names[:2])}{more}"
