"""Subsets and splits of a data set: by its card's configs, else by its file names (as `datasets`
does).

The card is the front matter of README.md as the Hugging Face hub defines it (`configs`, with
`config_name`, `data_files` and `data_dir`); the names are those that people give to files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, cast

import yaml

from tunesmith.bounded_yaml import safe_load
from tunesmith.data.sources.readers.registry import READABLE, kind_of
from tunesmith.errors import DataError

_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(?P<split>.+)-\d{5}-of-\d{5}\..*")
_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def holds_rows(file: str) -> bool:
    """True for a file that can be read and is neither hidden nor a description of others."""
    parts = PurePosixPath(file).parts
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and parts[-1] not in _METADATA and kind_of(parts[-1]) is not None


def card_of(readme: str) -> Mapping[str, Any]:
    """The front matter of a README; empty where there is none that can be read."""
    found = _FRONT_MATTER.match(readme)
    try:
        values: Any = safe_load(found.group(1)) if found else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return cast("Mapping[str, Any]", values) if isinstance(values, Mapping) else {}


def split_of(file: str) -> str | None:
    """The split that a file's name, or else the innermost folder around it, speaks of."""
    path = PurePosixPath(file)
    for part in (path.name, *reversed(path.parent.parts)):
        words = [_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _WORDS]
        if not words:
            continue
        shard = _SHARD.fullmatch(part)
        # train_sft-00000-of-00003 is a split of its own, beside train_gen.
        return shard.group("split") if shard else words[0]
    return None


def pick_files(
    files: Iterable[str],
    card: Mapping[str, Any],
    *,
    subset: str | None,
    split: str | None,
    where: str,
) -> list[str]:
    """The files of a subset and split, sorted. None named: the only subset, or its default; the
    split `train`, or the only one.

    Raises:
        DataError: there is no such subset or split, it is not clear which is meant, or what
        belongs to it can't be read.
    """
    listed = sorted(files)
    subsets = _subsets(listed, card)
    chosen = _choose(subsets, subset, "subset", where=where, preferred="default")
    splits = subsets[chosen]
    if not splits:
        raise DataError(
            "there is no file with rows",
            where=where,
            hint=f"readable are {READABLE}; revision: refs/convert/parquet may have them",
        )
    found = splits[_choose(splits, split, "split", where=where, preferred="train")]
    unreadable = [file for file in found if not holds_rows(file)]
    if unreadable or not found:
        message = f"can't read {unreadable[0]}" if unreadable else "the card names files not there"
        raise DataError(message, where=where, hint=f"readable are {READABLE}")
    kinds = sorted({cast("str", kind_of(file)) for file in found})
    if len(kinds) > 1:
        raise DataError(
            f"it has its rows in files of several kinds: {' '.join(kinds)}",
            where=where,
            hint="download it and name the files of one kind",
        )
    return found


def by_split(files: Sequence[str]) -> dict[str, list[str]]:
    """Files with rows by the split that their names speak of; all are `train` if none does."""
    readable = [file for file in files if holds_rows(file)]
    named: dict[str, list[str]] = {}
    for file in readable:
        named.setdefault(split_of(file) or "", []).append(file)
    if "" in named and len(named) == 1:
        return {"train": readable}
    # Beside files that say what they are, the others are documentation or examples.
    return {split: found for split, found in named.items() if split}


def _subsets(files: Sequence[str], card: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """For each subset its files by split."""
    configs = card.get("configs")
    if isinstance(configs, list):
        found: dict[str, dict[str, list[str]]] = {}
        for config in cast("list[Any]", configs):
            if isinstance(config, Mapping):
                values = cast("Mapping[str, Any]", config)
                name = str(values.get("config_name", "default"))
                found["default" if values.get("default") is True else name] = _config(files, values)
                if values.get("default") is True:
                    found[name] = found["default"]
        if found:
            return found
    tops = sorted({PurePosixPath(file).parts[0] for file in files if "/" in file})
    below = {top: [file for file in files if file.startswith(f"{top}/")] for top in tops}
    several = {
        top: by_split([file.removeprefix(f"{top}/") for file in inside])
        for top, inside in below.items()
    }
    named = {
        top: {split: [f"{top}/{file}" for file in found] for split, found in splits.items()}
        for top, splits in several.items()
        if splits and split_of(f"{top}/x") is None
    }
    flat = [file for file in files if "/" not in file and holds_rows(file)]
    # One folder is a folder; several, each with the same splits, are subsets.
    if not flat and len(named) > 1 and len(named) == len([top for top in tops if several[top]]):
        return named
    return {"default": by_split(files), **named}


def _config(files: Sequence[str], config: Mapping[str, Any]) -> dict[str, list[str]]:
    folder = str(config.get("data_dir") or "").strip("/")
    patterns = config.get("data_files")
    if patterns is None:
        return by_split([file for file in files if not folder or file.startswith(f"{folder}/")])
    entries = cast("list[Any]", patterns) if isinstance(patterns, list) else [patterns]
    if isinstance(patterns, Mapping):
        named = cast("Mapping[str, Any]", patterns)
        entries = [{"split": split, "path": path} for split, path in named.items()]
    found: dict[str, list[str]] = {}
    for entry in entries:
        values = cast("Mapping[str, Any]", entry) if isinstance(entry, Mapping) else {"path": entry}
        given = values.get("path")
        paths = cast("list[Any]", given) if isinstance(given, list) else [given]
        wanted = [_pattern(f"{folder}/{path}" if folder else str(path)) for path in paths]
        matches = [file for file in files if any(one.fullmatch(file) for one in wanted)]
        split = found.setdefault(str(values.get("split", "train")), [])
        split += [file for file in matches if file not in split]
    return found


def _pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` stays inside a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", glob.removeprefix("./"))
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(part, part.replace("[!", "[^") if part.startswith("[") else re.escape(part))
            for part in parts
        )
    )


def _choose(
    named: Mapping[str, Any], asked: str | None, what: str, *, where: str, preferred: str
) -> str:
    if asked is not None and asked in named:
        return asked
    names = list(named)
    shown = ", ".join(names) or "none"
    if asked is not None:
        close = difflib.get_close_matches(asked, names, n=1)
        hint = f"did you mean {close[0]}?" if close else None
        if what == "split" and ("[" in asked or "+" in asked):
            hint = "one split a source; limit: N takes its first rows"
        raise DataError(f"there is no {what} {asked}; there are: {shown}", where=where, hint=hint)
    if preferred in named:
        return preferred
    if len(names) == 1:
        return names[0]
    raise DataError(f"it has several {what}s: {shown}", where=where, hint=f"{what}: {names[0]}")
