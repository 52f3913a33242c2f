"""The cache of prepared documents on disk, keyed by a hash of everything that they depend on.

An entry is a folder with the arrays of `document_store.py` and `manifest.json`, which is written
last and holds the size and checksum of each. The folder is written under a temporary name, flushed
to disk and renamed, so an entry is complete or absent, and runs may share it. An entry that differs
from its manifest is deleted and prepared anew. Large files are read for their checksum only when
they changed (`digest_cache.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import tunesmith.data
import tunesmith.types
from tunesmith.data.preprocess.digest_cache import DigestCache
from tunesmith.data.preprocess.document_store import TYPES, Columns, map_columns
from tunesmith.data.sources.sources import Source, canonical_json, content_hash
from tunesmith.data.templates.template import Template

MANIFEST = "manifest.json"
_VERSION = 1
_BLOCK = 1 << 22
_DAY = 86400.0
_UNUSED_DAYS = 30
_ASIDE_DAYS = 2
"""The age in days at which an unfinished folder counts as left over by a run that was killed."""


def cache_key(
    cache: Path,
    sources: Sequence[Source],
    template: Template,
    settings: Mapping[str, Any],
) -> tuple[str, dict[str, str]] | None:
    """The key of a cache entry, with the SHA-256 of each source; None where a source is not a file.

    The key is a hash of the data's bytes and how they are read, the tokenizer, its template, the
    settings, and this program's own code.

    Raises:
        DataError: a source can't be read.
    """
    tokenizer = _tokenizer_key(template)
    if tokenizer is None or any(source.path is None for source in sources):
        return None
    hashes = _hashes(_digest_cache(cache), sources)
    key = {
        "version": _VERSION,
        "sources": [[_source_key(source), hashes[source.name]] for source in sources],
        "tokenizer": tokenizer,
        "settings": dict(settings),
        "code": _code_key(),
    }
    return hashlib.sha256(canonical_json(key)).hexdigest()[:40], hashes


def _digest_cache(cache: Path) -> DigestCache:
    """The digest cache of a cache folder, for the data's files and its own."""
    return DigestCache(cache / "known")


def _hashes(known: DigestCache, sources: Sequence[Source]) -> dict[str, str]:
    return {
        source.name: known.digest(source.path, "sha256", partial(content_hash, source))
        if source.path is not None and source.path.is_file()
        else content_hash(source)
        for source in sources
    }


def _source_key(source: Source) -> dict[str, Any]:
    """The settings by which the source is read: its fields except the path."""
    fields = {one.name for one in dataclasses.fields(source)} - {"path", "rows"}
    suffixes = "" if source.path is None else "".join(source.path.suffixes)
    return {"suffixes": suffixes, **{name: repr(getattr(source, name)) for name in sorted(fields)}}


def _tokenizer_key(template: Template) -> dict[str, Any] | None:
    tokenizer: Any = template.tokenizer
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    jinja = template.jinja or (tokenizer.chat_template if template.has_chat_template else "")
    return {
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "backend": hashlib.sha256(backend.to_str().encode()).hexdigest(),
        "named": {name: str(text) for name, text in tokenizer.special_tokens_map.items()},
        "template": [template.name == "none", template.sha256],
        # A template that writes the date gives other texts each day.
        "date": date.today().isoformat() if "strftime_now" in str(jinja) else None,
        "stops": sorted(template.stop_ids),
        "special": [sorted(template.special_ids), list(template.special_texts)],
        "ends": [template.bos_id, template.eos_id],
    }


def _code_key() -> list[str]:
    from importlib.metadata import version

    digest = hashlib.sha256()
    for file in _code_files():
        digest.update(file.read_bytes())
    names = ("tunesmith", "transformers", "tokenizers", "jinja2", "pyarrow")
    return [digest.hexdigest(), *(version(name) for name in names)]


def _code_files() -> list[Path]:
    """The source files that decide which ids a row becomes."""
    data = Path(tunesmith.data.__file__).parent
    return sorted([*data.rglob("*.py"), Path(tunesmith.types.__file__)])


class CacheEntry:
    """One entry of the cache: the documents of one set of sources, template and settings."""

    def __init__(self, folder: Path, key: str, hashes: Mapping[str, str]) -> None:
        self.hashes = hashes
        self._known = _digest_cache(folder)
        self._root = folder / "documents"
        self.folder = self._root / key

    def read(self) -> tuple[Columns, dict[str, Any]] | None:
        """The arrays and the other values of the entry; None if there is no entry.

        Raises:
            DamagedEntry: the entry differs from its manifest.
        """
        try:
            text = (self.folder / MANIFEST).read_text(encoding="utf-8")
        except FileNotFoundError as error:
            if self.folder.exists():
                raise DamagedEntry(f"{MANIFEST} is missing") from error
            return None
        except OSError as error:
            raise DamagedEntry(str(error)) from error
        try:
            manifest = json.loads(text)
            for name, (size, checksum) in manifest["files"].items():
                self._check(self.folder / name, size, checksum)
            if _digest(manifest["kept"]) != manifest["kept_sha256"]:
                raise DamagedEntry(f"{MANIFEST} is not what was written")
            columns = map_columns(self.folder, manifest["names"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedEntry(f"{MANIFEST}: {error}") from error
        with contextlib.suppress(OSError):
            os.utime(self.folder / MANIFEST)
        return columns, manifest["kept"]

    def aside(self) -> Path:
        """A new temporary folder for the arrays, used by this process only. Raises OSError."""
        folder = self._root / f".{self.folder.name}.{uuid4().hex[:12]}.tmp"
        folder.mkdir(parents=True)
        return folder

    def commit(self, aside: Path, names: Sequence[str], kept: Mapping[str, Any]) -> None:
        """Rename the temporary folder to the entry's name, unless another run was first. Raises
        OSError.
        """
        # The manifest is written after the arrays are on disk: with it, the entry is complete.
        files = {f"{name}.bin": self._flushed(aside / f"{name}.bin") for name in TYPES}
        manifest = {
            "files": files,
            "names": list(names),
            "kept": kept,
            "kept_sha256": _digest(kept),
        }
        with (aside / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(aside)
        try:
            aside.rename(self.folder)
        except OSError:
            if not (self.folder / MANIFEST).exists():
                raise
            discard(aside)
        _sync_folder(self._root)
        self._prune()

    def remove(self) -> None:
        """Remove the entry in one step, by a rename. Raises OSError."""
        gone = self._root / f".{self.folder.name}.{uuid4().hex[:12]}.tmp"
        with contextlib.suppress(FileNotFoundError):
            self.folder.rename(gone)
            discard(gone)

    def _flushed(self, path: Path) -> tuple[int, int]:
        """Flush a file to disk; its size and checksum."""
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return path.stat().st_size, self._checksum(path, written_here=True)

    def _check(self, path: Path, size: int, checksum: int) -> None:
        if path.stat().st_size != size:
            raise DamagedEntry(f"{path.name} has {path.stat().st_size} bytes, not {size}")
        if self._checksum(path) != checksum:
            raise DamagedEntry(f"{path.name} is not what was written")

    def _checksum(self, path: Path, *, written_here: bool = False) -> int:
        return int(
            self._known.digest(
                path, "crc32", lambda: str(_checksum(path)), written_here=written_here
            )
        )

    def _prune(self) -> None:
        """Remove entries that were not used for long, and temporary folders of runs that were
        killed.
        """
        now = time.time()
        self._known.prune(now - _UNUSED_DAYS * _DAY)
        for other in self._root.iterdir():
            days = _ASIDE_DAYS if other.name.startswith(".") else _UNUSED_DAYS
            manifest = other / MANIFEST
            with contextlib.suppress(OSError):
                used = (manifest if manifest.exists() else other).stat().st_mtime
                if now - used > days * _DAY:
                    discard(other)


class DamagedEntry(Exception):
    """An entry can't be used, for the reason in the text; preparing the documents anew replaces
    it.
    """


def discard(folder: Path) -> None:
    """Remove a folder as far as possible; memory maps of its files stay readable."""
    shutil.rmtree(folder, ignore_errors=True)


def _digest(kept: Any) -> str:
    return hashlib.sha256(canonical_json(kept)).hexdigest()


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":
        return  # Windows can't open a folder to flush it
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
