"""Examines the files of a model folder before any library loads them (safetensors, JSON, tokenizer
files), so that a damaged file is named, with what it is.

A download that went wrong leaves a Git LFS pointer, a page of HTML, or a file that is empty or cut
off. The loaders of transformers, tokenizers and safetensors each fail in another way on these, and
seldom name the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, first_line

TEXTS = (
    "config.json", "generation_config.json", "adapter_config.json", "tunesmith.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.json", "preprocessor_config.json", "processor_config.json", "vocab.json",
    "vocab.txt", "merges.txt", "*.jinja", "*.model", "*.tiktoken", "*.safetensors.index.json",
)  # fmt: skip
"""What transformers, peft or Tunesmith may read of a model folder, beside its weights."""
LICENSES = tuple(
    f"{name}{ending}"
    for name in ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
    for ending in ("", ".txt", ".md")
)
"""Names under which a model's terms lie beside it."""
COPIED = ("*.py", *LICENSES)
"""What goes along with a model that is written again, beside `TEXTS`."""
ANEW = "get the file anew from where the model was published"
_POINTER = b"version https://git-lfs"
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")
_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "head_dim")
_LARGEST_HEADER = 100_000_000
"""safetensors' own limit, in bytes."""


def check_model_files(folder: Path, *, weights: bool) -> None:
    """Look into each file of a model or adapter folder that may be read, `weights` too if asked.

    Raises:
        ModelError: one is no file of its kind: the file, what it is, and what helps.
    """
    refuse_links(folder, (*TEXTS, *COPIED, "*.safetensors"))
    for path in sorted({path for pattern in TEXTS for path in folder.glob(pattern)}):
        _check(path)
    if weights:
        for path in weight_files(folder):
            _check(path)


def inside(folder: Path, file: Path) -> bool:
    """True if a file of a model folder is no link that leaves it.

    The hub's cache is known: its `snapshots` are links into `blobs` beside them.
    """
    home = folder.resolve()
    places = [home]
    if "snapshots" in home.parts:
        at = len(home.parts) - home.parts[::-1].index("snapshots") - 1
        places.append(Path(*home.parts[:at]) / "blobs")
    real = file.resolve()
    return any(real.is_relative_to(place) for place in places)


def refuse_links(folder: Path, patterns: Iterable[str]) -> None:
    """A model folder may come from anybody, with a link in it to any file of this machine, whose
    contents would be read as a text or be copied into a run.

    Raises:
        ModelError: a file of these names is a link that leaves the folder.
    """
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        if path.is_symlink() and not inside(folder, path):
            raise ModelError(
                "is a link that leaves the model's folder",
                where=str(path),
                hint=f"if that is meant, put the file itself there: cp {path.resolve()} {folder}",
            )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights: one by its usual name, else those that the index
    names, else all.

    Raises:
        ModelError: the index names a file that is not there.
    """
    for stem in ("model", "adapter_model"):
        if (folder / f"{stem}.safetensors").exists():
            return [folder / f"{stem}.safetensors"]
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _indexed(index)
    return sorted(folder.glob("*.safetensors"))


def open_weights(path: Path) -> Any:
    """safetensors' own view of the file, for torch.

    Raises:
        ModelError: it is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        found = what_it_is(path) or (f"is no whole safetensors file: {first_line(error)}", ANEW)
        raise ModelError(found[0], where=str(path), hint=found[1]) from error


def what_it_is(path: Path) -> tuple[str, str] | None:
    """What a file is that is surely not what its name says, and what helps; None if it may be."""
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "is empty", ANEW
    if head.startswith(_POINTER):
        return "is a Git LFS pointer, not the file itself", f"run: git -C {path.parent} lfs pull"
    if head.lstrip().lower().startswith(_PAGES):
        return "is a web page (HTML), not the file itself", f"{ANEW}; a login may be needed"
    if not head.strip(b"\0"):
        return "begins with zeros only, as after a download that was cut off", ANEW
    if head.startswith((b"PK\x03\x04", b"\x1f\x8b")):
        return "is an archive, not the file itself", "unpack it"
    return None


def _indexed(index: Path) -> list[Path]:
    named = _object(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ModelError("names no weights (weight_map)", where=str(index), hint=ANEW)
    names = sorted({str(name) for name in named.values()})  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    for name in names:
        if name != Path(name).name or "\\" in name:
            raise ModelError(
                f"its index names weights in {name!r}, which is not a file of the folder",
                where=str(index),
                hint="get the model anew from where it was published",
            )
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{missing[0]}{more} of its {len(names)} files of weights is not there",
            where=str(index),
            hint="finish the download of the model",
        )
    return [index.parent / name for name in names]


def _check(path: Path) -> None:
    try:
        stamp = path.stat()
        fault = _fault(path, (stamp.st_ino, stamp.st_size, stamp.st_mtime_ns))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelError(f"can't be read: {reason}", where=str(path), hint=ANEW) from error
    if fault is not None:
        raise ModelError(fault[0], where=str(path), hint=fault[1])


@lru_cache(maxsize=1024)
def _fault(path: Path, stamp: tuple[int, ...]) -> tuple[str, str] | None:
    """What is wrong with the file; `stamp` changes when the file does."""
    found = what_it_is(path)
    if found is not None:
        return found
    if path.suffix == ".safetensors":
        return _fault_of_tensors(path, size=stamp[1])
    if path.suffix == ".json":
        try:
            found = _object(path)
        except ModelError as error:
            return error.message, error.hint or ANEW
        return _fault_of_sizes(found) if path.name == "config.json" else None
    return None


def _fault_of_sizes(config: dict[str, Any]) -> tuple[str, str] | None:
    """Sizes of a model that no model can have; lists and null are left to transformers."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        for key in _SIZES:
            value: Any = part.get(key)
            if isinstance(value, bool | float | str) or (isinstance(value, int) and value < 1):
                return f"{key} is {value!r}, and must be a whole number above 0", ANEW
    return None


def _fault_of_tensors(path: Path, size: int) -> tuple[str, str] | None:
    with path.open("rb") as file:
        head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > _LARGEST_HEADER:
        return "is no safetensors file: its first 8 bytes are not the length of a header", ANEW
    if 8 + length > size:
        return f"is cut off: its header has {length:,} bytes, the file has {size:,}", ANEW
    try:
        open_weights(path)
    except ModelError as error:
        stated = _stated_size(path, length)
        if stated is not None and stated > size:
            return f"is cut off: {size:,} of {stated:,} bytes are there", ANEW
        return error.message, ANEW
    return None


def _stated_size(path: Path, length: int) -> int | None:
    """Bytes of the whole file by its header; None if that can't be read."""
    with path.open("rb") as file:
        file.seek(8)
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
            return 8 + length + max(ends, default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
            return None


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        message = f"is not UTF-8 text at byte {error.start:,}, so it is damaged"
        raise ModelError(message, where=str(path), hint=ANEW) from error
    except (ValueError, RecursionError) as error:
        message = f"is no whole JSON: {first_line(error)}"
        raise ModelError(message, where=str(path), hint=ANEW) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path), hint=ANEW)
    return value
