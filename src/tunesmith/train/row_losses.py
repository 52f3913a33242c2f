"""The loss of every training row in every epoch, saved in checkpoints and written as
rows.parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.types import Document, IntArray


class RowLosses:
    """One entry for each time a document was learned from; 28 bytes each, in arrays that double
    when they are full.
    """

    def __init__(self) -> None:
        self._used = 0
        self._held: dict[str, NDArray[np.generic]] = {
            "step": np.empty(0, np.int32),
            "document": np.empty(0, np.int64),
            "loss": np.empty(0, np.float64),
            "weight": np.empty(0, np.float64),
        }

    def add(
        self,
        step: int,
        document: IntArray,
        *,
        loss: NDArray[np.float64],
        weight: NDArray[np.float64],
    ) -> None:
        """Note a step's documents with their sums of weight * loss and of weight."""
        start, self._used = self._used, self._used + len(document)
        added = {"step": step, "document": document, "loss": loss, "weight": weight}
        for name, values in added.items():
            held = self._held[name]
            if self._used > len(held):
                self._held[name] = np.empty(max(256, 2 * self._used), held.dtype)
                self._held[name][:start] = held[:start]
            self._held[name][start : self._used] = values

    def tensors(self) -> dict[str, Tensor]:
        """Everything noted, for a checkpoint."""
        return {
            f"rows.{name}": torch.from_numpy(values) for name, values in self._columns().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        self._held = {
            name: tensors[f"rows.{name}"].numpy().astype(held.dtype)
            for name, held in self._held.items()
        }
        self._used = len(self._held["step"])

    def forget(self) -> None:
        """Begin anew, since the documents are others now."""
        self.__init__()

    def _columns(self) -> dict[str, NDArray[np.generic]]:
        return {name: held[: self._used] for name, held in self._held.items()}

    def write(
        self, path: Path, documents: Sequence[Document], epoch_of: Callable[[int], int]
    ) -> None:
        """rows.parquet: source, row, epoch (from 1), step, loss (mean per weight), weight, tokens,
        target_tokens.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = self._columns()
        chosen = [documents[int(number)] for number in columns["document"]]
        weight = np.asarray(columns["weight"], np.float64)
        table = pa.table(
            {
                "source": pa.array(
                    [d.origin.source for d in chosen], pa.string()
                ).dictionary_encode(),
                "row": pa.array([d.origin.row for d in chosen], pa.int64()),
                "epoch": pa.array([epoch_of(int(s) - 1) + 1 for s in columns["step"]], pa.int32()),
                "step": pa.array(columns["step"], pa.int32()),
                "loss": pa.array(
                    np.asarray(columns["loss"]) / np.maximum(weight, 1e-30), pa.float64()
                ),
                "weight": pa.array(weight, pa.float64()),
                "tokens": pa.array([d.tokens for d in chosen], pa.int32()),
                "target_tokens": pa.array([d.target_tokens for d in chosen], pa.int32()),
            }
        )
        aside = path.with_name(f".{path.name}.tmp")
        pq.write_table(table, aside, compression="zstd")
        aside.replace(path)
