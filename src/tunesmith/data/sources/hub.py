"""Data sets of the Hugging Face hub as local files, pinned to their commit."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar, cast

from tunesmith.data.sources.splits import card_of, holds_rows, pick_files
from tunesmith.errors import DataError, first_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CARD = "README.md"

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HubFiles:
    """Files of a data set: by name (`org/name/file`), on disk, all of one commit."""

    commit: str
    files: list[tuple[str, Path]]


@dataclass(frozen=True, slots=True)
class _Listing:
    commit: str
    files: list[str]


def is_hub_id(path: str) -> bool:
    """True for what has the form `org/name` and no ending of a readable file."""
    return _ID.fullmatch(path) is not None and not holds_rows(path)


def fetch(
    name: str,
    *,
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
) -> HubFiles:
    """The files of a split, downloaded where they are not in the hub's cache yet.

    `revision` is a branch, tag or commit; the newest where none is given. Without a connection a
    data set that was read before is found again, with all of its files.

    Raises:
        DataError: no such data set, subset, split or revision, no access, no connection, or a
        file name that leads out of the data set's folder.
    """
    listing, online = _list(name, revision)
    for file in listing.files:
        _check_name(file, name)
    card = ""
    if _CARD in listing.files:
        card = _download(name, _CARD, listing.commit, online=online).read_text("utf-8", "replace")
    chosen = pick_files(listing.files, card_of(card), subset=subset, split=split, where=name)
    files = [
        (f"{name}/{file}", _download(name, file, listing.commit, online=online)) for file in chosen
    ]
    return HubFiles(listing.commit, files)


def _list(name: str, revision: str | None) -> tuple[_Listing, bool]:
    """All files of the data set, and whether the hub could be asked."""
    import huggingface_hub

    kept = _kept_file(name, revision)
    try:
        found = _asked(
            name, revision, lambda: huggingface_hub.HfApi().dataset_info(name, revision=revision)
        )
    except _UnreachableError as error:
        if not kept.is_file():
            raise DataError(
                "is no file here, was never read from the hub, and the hub can't be reached",
                where=name,
                hint="check the connection and HF_HUB_OFFLINE; or give a local file or folder",
            ) from error
        values = json.loads(kept.read_text(encoding="utf-8"))
        return _Listing(values["commit"], values["files"]), False
    files = sorted(sibling.rfilename for sibling in found.siblings or ())
    if not found.sha:
        raise DataError("the hub names no commit of it", where=name, hint="give a revision of it")
    listing = _Listing(found.sha, files)
    _keep(kept, listing)
    if revision != found.sha:
        _keep(_kept_file(name, found.sha), listing)
    return listing, True


class _UnreachableError(Exception):
    """The hub did not answer."""


def _asked(name: str, revision: str | None, ask: Callable[[], _T]) -> _T:
    """The hub's answer, with its refusals as errors of ours."""
    from huggingface_hub import errors

    try:
        return ask()
    except errors.GatedRepoError as error:
        hint = "ask on its page, then: hf auth login"
        raise DataError("its owner must grant access first", where=name, hint=hint) from error
    except errors.RevisionNotFoundError as error:
        hint = "leave out revision for the newest"
        raise DataError(f"has no revision {revision}", where=name, hint=hint) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise DataError(
            "is neither a file or folder here nor a data set on the hub",
            where=name,
            hint=f"a private one needs: hf auth login; the current folder is {Path.cwd()}",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _UnreachableError(_first_line(error)) from error
    except errors.EntryNotFoundError as error:
        hint = "give another revision, or download it and give the folder"
        raise DataError(f"is not whole: {_first_line(error)}", where=name, hint=hint) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code >= 500:
            raise _UnreachableError(str(error)) from error
        hint = "a private or gated one needs: hf auth login"
        message = f"the hub refuses it: {_first_line(error)}"
        raise DataError(message, where=name, hint=hint) from error
    # The base class is that of the HTTP library underneath, which depends on the hub's version.
    except (OSError, cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])) as error:
        raise _UnreachableError(str(error)) from error


def _download(name: str, file: str, commit: str, *, online: bool) -> Path:
    """The file on disk. It is inside the hub's cache of this data set, whatever links say."""
    import huggingface_hub

    try:
        path = Path(
            _asked(
                name,
                commit,
                lambda: cast("Any", huggingface_hub).hf_hub_download(
                    name, file, repo_type="dataset", revision=commit, local_files_only=not online
                ),
            )
        )
    except _UnreachableError as error:
        raise DataError(
            f"{file} can't be downloaded: {_first_line(error)}",
            where=name,
            hint="check the connection and HF_HUB_OFFLINE; or give a local file or folder",
        ) from error
    folder = path.parents[len(PurePosixPath(file).parts) - 1].resolve()
    # The cache keeps contents in `blobs` and links to them from `snapshots/COMMIT`.
    allowed = (folder, folder.parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(place) for place in allowed):
        raise DataError(
            f"{file} is a link that leads out of the data set's folder",
            where=name,
            hint="it is not read; report it to the data set's owner",
        )
    return path


def _check_name(file: str, name: str) -> None:
    parts = file.split("/")
    if "\\" in file or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
        raise DataError(
            f"it has a file named {file!r}, which leads out of its folder",
            where=name,
            hint="it is not read; report it to the data set's owner",
        )


def _kept_file(name: str, revision: str | None) -> Path:
    """Where the listing of a revision is kept for times without a connection."""
    key = hashlib.sha256(f"{name}\n{revision or ''}".encode()).hexdigest()[:32]
    return default_cache_folder() / "hub" / f"{key}.json"


def _keep(path: Path, listing: _Listing) -> None:
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(
            json.dumps({"commit": listing.commit, "files": listing.files}), encoding="utf-8"
        )
        os.replace(aside, path)
    except OSError:  # then the next run needs a connection again
        aside.unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return first_line(error)


def default_cache_folder() -> Path:
    """TUNESMITH_CACHE, else `tunesmith` in the user's cache folder."""
    if named := os.environ.get("TUNESMITH_CACHE"):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "tunesmith"
