"""The safetensors files of a model folder, of which a slice of a tensor can be read at a time
(`safe_open(...).get_slice`), and a model's tensors by the names that they have there.

The parts of a quantised tensor (`quantization/dequantize.py`) count as the one bfloat16 tensor that
they stand for. Names in memory are not always names on disk: transformers renames, fuses and splits
tensors while it reads them (`core_model_loading`), and leaves out what no module holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tunesmith.model.model_files import open_weights, weight_files
from tunesmith.model.quantization.dequantize import Packed, find_packed, quant_method
from tunesmith.model.source import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightFiles:
    """The files of a model, and the parameters that stand for what was not read of them yet."""

    def __init__(self, folder: Path, placeholders: Sequence[nn.Parameter] = ()) -> None:
        self.placeholders = tuple(placeholders)
        self.paths = weight_files(folder)
        self._files: dict[str, Any] = {}
        self._path: dict[str, Path] = {}
        for path in self.paths:
            file = open_weights(path)
            self._files.update(dict.fromkeys(file.keys(), file))
            self._path.update(dict.fromkeys(file.keys(), path))
        self._packed: dict[str, Packed | None] = dict.fromkeys(self._files)
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        if quant_method(config) is not None:
            self._packed = find_packed(self._files, config)

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._packed.keys()

    def names_in(self, path: Path) -> Iterable[str]:
        """The tensors of one file."""
        places = ((n, n if p is None else p.main) for n, p in self._packed.items())
        return [name for name, place in places if self._path[place] == path]

    def metadata(self, path: Path) -> dict[str, str]:
        """What one file says of itself."""
        first = next((file for name, file in self._files.items() if self._path[name] == path), None)
        return (first.metadata() if first is not None else None) or {"format": "pt"}

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the tensor of this name; None if there is none."""
        if name not in self._packed:
            return None
        packed = self._packed[name]
        if packed is not None:
            return packed.shape(self._raw_shape, self._raw)
        return self._raw_shape(name)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        packed = self._packed[name]
        return self._raw(name) if packed is None else packed.tensor(self._raw)

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The part of a tensor that begins at `offsets` and has `sizes`, and no more of it, but for
        a quantised one.
        """
        wanted = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        if not sizes or self._packed[name] is not None:
            return self.tensor(name)[wanted]
        return self._files[name].get_slice(name)[wanted]

    def _raw(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def _raw_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def read_for(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The same for a parameter named as in a CausalLM, inside an adapter or not."""
        return self.read(file_name(name), offsets, sizes)


def file_name(name: str) -> str:
    """The name in the files of a parameter of a CausalLM, with or without an adapter around it."""
    return name.removeprefix("model.").removeprefix("base_model.model.").replace(".base_layer", "")


@dataclass(frozen=True, slots=True)
class FileTensors:
    """A model's tensors by the names in its files."""

    known: Mapping[str, Tensor]  # that the files have too
    new: Mapping[str, Tensor]  # that they lack, as a head that is no longer the embedding
    unread: frozenset[str]  # names in the files of what no module holds, as the layers of an MTP


def tensors_by_file_name(
    model: Any, state: Mapping[str, Tensor], names: Collection[str]
) -> FileTensors:
    """`state`, the tensors of a transformers model, by the `names` of the files it was read from.

    What one tensor is read into several modules as (a tied head) has one name in the files, or all.
    """
    from transformers.core_model_loading import revert_weight_conversion

    prefix = f"{model.base_model_prefix}."
    known: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(model, dict(state)).items():
        # Files of old models may lack the prefix of the decoder, or have it too often.
        spellings = (name, name.removeprefix(prefix), prefix + name)
        found = next((spelling for spelling in spellings if spelling in names), None)
        if found is None:
            new[name] = tensor
        else:
            known[found] = tensor
    written = {_storage(tensor) for tensor in known.values()}
    new = {name: tensor for name, tensor in new.items() if _storage(tensor) not in written}
    left = frozenset(names) - known.keys()
    if new:
        left = frozenset(name for name in left if not _is_read(model, name, state))
    return FileTensors(known, new, left)


def _storage(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _is_read(model: Any, name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a tensor of the files became a part of the model, under any name."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    conversions = getattr(model, "_weight_conversions", None) or []
    renamed, _ = rename_source_key(
        name,
        [one for one in conversions if isinstance(one, WeightRenaming)],
        [one for one in conversions if isinstance(one, WeightConverter)],
        model.base_model_prefix,
        dict(state),
    )
    return renamed in state
