"""Files of a data source: one file, those of a folder, or those of a glob pattern."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from tunesmith.data.sources.readers.registry import READABLE
from tunesmith.data.sources.sources import resolve_path
from tunesmith.data.sources.splits import by_split, card_of, holds_rows, pick_files
from tunesmith.errors import DataError

_MAGIC = ("*", "?", "[")


def is_pattern(path: str, folders: Sequence[Path] = ()) -> bool:
    """True for a path with `*`, `?` or `[...]`, unless a file has that very name."""
    return any(sign in path for sign in _MAGIC) and not find(path, folders).exists()


def find(path: str, folders: Sequence[Path] = ()) -> Path:
    """The path from the current folder, else from the first of `folders` in which it is there."""
    found = resolve_path(path)
    for folder in folders:
        if found.exists():
            break
        found = resolve_path(path, folder)
    return found


def pattern_files(pattern: str, folders: Sequence[Path] = ()) -> list[tuple[str, Path]]:
    """Readable files that match, sorted, each under the name that the pattern gives it.

    `**` goes through any number of folders. The current folder is looked through first, then each
    of `folders` until one has a match.

    Raises:
        DataError: nothing matches, or nothing that can be read.
    """
    matches: list[str] = []
    base = Path()
    expanded = str(Path(pattern).expanduser()) if pattern.startswith("~") else pattern
    for base in (Path(), *folders):
        matches = sorted(glob.glob(expanded, root_dir=base, recursive=True))
        if matches:
            break
    files = [name for name in matches if (base / name).is_file()]
    readable = [name for name in files if holds_rows(Path(name).name)]
    if readable:
        _refuse_links(base / _fixed(expanded), [base / name for name in readable], pattern)
        return [(Path(name).as_posix(), base / name) for name in readable]
    if files:
        others = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else files[0]
        message, hint = f"matches {others}, which can't be read", f"readable are {READABLE}"
    else:
        message, hint = "no file matches", f"the current folder is {Path.cwd()}"
    raise DataError(message, where=pattern, hint=hint)


def folder_files(
    name: str, folder: Path, *, subset: str | None = None, split: str | None = None
) -> list[tuple[str, Path]]:
    """All readable files in a folder and those inside it, sorted by name; hidden ones are not seen.

    A folder that a `datasets` object was saved to gives the shards that its state names. Of a
    folder with several splits one must be chosen, as with a data set of the hub.

    Raises:
        DataError: nothing in it can be read, or it is not clear what is meant.
    """
    inside = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )
    listed = _without_caches(folder, inside)
    readable = [file for file in listed if holds_rows(file)]
    if not readable:
        raise DataError(
            "no file in this folder can be read", where=name, hint=f"readable are {READABLE}"
        )
    card: dict[str, Any] = {}
    if (folder / "README.md").is_file():
        card = dict(card_of((folder / "README.md").read_text("utf-8", "replace")))
    saved = _saved_splits(folder, readable)
    if saved and subset is None and split in saved:
        readable = saved[split]
    elif not saved and (subset is not None or split is not None or "configs" in card):
        readable = pick_files(listed, card, subset=subset, split=split, where=name)
    elif len(splits := saved or by_split(readable)) > 1 or (saved and split is not None):
        likely = "train" if "train" in splits else next(iter(splits))
        raise DataError(
            f"the folder has several splits: {', '.join(splits)}"
            if split is None
            else f"there is no split {split}; there are: {', '.join(splits)}",
            where=name,
            hint=f"name one: 'data.train={{path: {name}, split: {likely}}}', or a pattern of files",
        )
    _refuse_links(folder, [folder / file for file in readable], name)
    return [(f"{name.rstrip('/')}/{file}", folder / file) for file in readable]


def _saved_splits(folder: Path, files: Sequence[str]) -> dict[str, list[str]]:
    """The files by split of a folder to which a `DatasetDict` was saved; empty for any other."""
    try:
        described: Any = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))
        names = [str(name) for name in described["splits"]]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {name: [file for file in files if file.startswith(f"{name}/")] for name in names}


def _fixed(pattern: str) -> Path:
    """The folders that a pattern names before its first sign."""
    parts = Path(pattern).parts
    signs = [number for number, part in enumerate(parts) if any(sign in part for sign in _MAGIC)]
    return Path(*parts[: signs[0]]) if signs else Path(pattern).parent


def _refuse_links(folder: Path, files: Sequence[Path], name: str) -> None:
    """Refuse files that were found, not named, and that are links to somewhere else.

    A folder may come from anybody, with a link in it to any file of this machine. Those of the
    hub's cache are known: contents stand in `blobs` beside its `snapshots`.
    """
    home = folder.resolve()
    allowed = [home]
    if "snapshots" in home.parts:
        at = len(home.parts) - home.parts[::-1].index("snapshots") - 1
        allowed.append(Path(*home.parts[:at]) / "blobs")
    for file in files:
        real = file.resolve()
        if not any(real.is_relative_to(place) for place in allowed):
            raise DataError(
                f"{file.relative_to(folder)} is a link to {real}, which is not inside it",
                where=name,
                hint=f"if that is meant, name the file itself: {file}",
            )


def _without_caches(folder: Path, files: list[str]) -> list[str]:
    """The files less Arrow files that a `state.json` beside them does not name."""
    named: dict[str, set[str]] = {}
    for file in files:
        path = Path(file)
        if path.name != "state.json":
            continue
        try:
            state: Any = json.loads((folder / file).read_text(encoding="utf-8"))
            shards = cast("list[dict[str, str]]", state["_data_files"])
            named[path.parent.as_posix()] = {shard["filename"] for shard in shards}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # some other program's state
    return [
        file
        for file in files
        if not file.endswith(".arrow")
        or (parent := Path(file).parent.as_posix()) not in named
        or Path(file).name in named[parent]
    ]
