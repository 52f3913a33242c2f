"""safetensors files written piece by piece with fsync: only one tensor at a time is copied to the
CPU.

`safetensors.torch.save_file` is not used here, for three reasons. It brings all tensors to the CPU
before it writes the first, and a checkpoint is written between steps exactly where no memory is
free for copies: a state of 500 MiB that has to be copied needs 500 MiB more with it and 100 MiB
(two tensors of 50 MiB) here; a state that lies ready on the CPU needs 32 MiB more (500 MiB with
safetensors 0.5) and nothing here. It can't be left off half-way, which an abandoned write does.
And the SHA-256 of the manifest is of what was meant to be written, where a second reading would
take what the disk has made of it for right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 24
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encoded(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces: one tensor at a time is brought to the CPU, none is copied."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data must begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel() == 0:  # its elements can't be seen as bytes
            continue
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def write_synced(
    path: Path, pieces: Iterable[bytes | memoryview], between: Callable[[], None]
) -> dict[str, Any]:
    """Write and bring to the disk; bytes and SHA-256 are of what was meant to be written.

    `between` is called before each block, and may raise to leave the file as it is.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for piece in pieces:
            for start in range(0, len(piece), BLOCK):
                between()
                block = piece[start : start + BLOCK]
                digest.update(block)
                file.write(block)
                size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def file_digest(path: Path) -> str:
    """SHA-256 of a file's contents."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
