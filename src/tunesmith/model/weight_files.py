"""The safetensors files of a model folder, of which a slice of a tensor can be read at a time
(`safe_open(...).get_slice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tunesmith.model.model_files import open_weights, weight_files


class WeightFiles:
    """The files of a model, and the parameters that stand for what was not read of them yet."""

    def __init__(self, folder: Path, placeholders: Sequence[nn.Parameter] = ()) -> None:
        self.placeholders = tuple(placeholders)
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            file = open_weights(path)
            self._files.update(dict.fromkeys(file.keys(), file))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor of this name; None if there is none."""
        file = self._files.get(name)
        return None if file is None else tuple(file.get_slice(name).get_shape())

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The part of a tensor that begins at `offsets` and has `sizes`, and no more of it."""
        part = self._files[name].get_slice(name)
        if not sizes:
            return self._files[name].get_tensor(name)
        return part[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]

    def read_for(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The same for a parameter named as in a CausalLM, inside an adapter or not."""
        return self.read(file_name(name), offsets, sizes)


def file_name(name: str) -> str:
    """The name in the files of a parameter of a CausalLM, with or without an adapter around it."""
    return name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer", "")
