"""Loss of every training row in every epoch, kept in memory and in checkpoints, written as
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
    """One entry for each time a document was learned from."""

    def __init__(self) -> None:
        self._step: list[IntArray] = []
        self._document: list[IntArray] = []
        self._loss: list[NDArray[np.float64]] = []
        self._weight: list[NDArray[np.float64]] = []

    def add(
        self,
        step: int,
        document: IntArray,
        *,
        loss: NDArray[np.float64],
        weight: NDArray[np.float64],
    ) -> None:
        """Note a step's documents with their sums of weight * loss and of weight."""
        self._step.append(np.full(len(document), step, np.int32))
        self._document.append(document)
        self._loss.append(loss)
        self._weight.append(weight)

    def tensors(self) -> dict[str, Tensor]:
        """Everything noted, for a checkpoint."""
        return {
            f"rows.{name}": torch.from_numpy(values) for name, values in self._columns().items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what a checkpoint holds."""
        self._step = [tensors["rows.step"].numpy()]
        self._document = [tensors["rows.document"].numpy()]
        self._loss = [tensors["rows.loss"].numpy()]
        self._weight = [tensors["rows.weight"].numpy()]

    def forget(self) -> None:
        """Begin anew, since the documents are others now."""
        self.__init__()

    def _columns(self) -> dict[str, NDArray[np.generic]]:
        if not self._step:
            none, zero = np.empty(0, np.int32), np.empty(0)
            return {"step": none, "document": none, "loss": zero, "weight": zero}
        return {
            "step": np.concatenate(self._step),
            "document": np.concatenate(self._document),
            "loss": np.concatenate(self._loss),
            "weight": np.concatenate(self._weight),
        }

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
