"""Model sources: a folder, a run, an adapter, a .gguf file or a hub id, resolved to a local
folder.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError, first_line
from tunesmith.model.model_files import check_model_files

CHOICE_FILE = "tunesmith.json"
"""Beside each model and adapter that we write: what its other files have no place for."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_WEIGHTS = "*.safetensors"
_WANTED = [_WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
_UNWANTED = ["original/*", "onnx/*", "consolidated*.safetensors", "*/*.safetensors"]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's files on this machine. `adapter_folder` holds a peft adapter that goes on top of
    `folder`.
    """

    name: str  # as the user wrote it
    folder: Path  # config, weights, tokenizer of the (base) model
    commit: str | None = None  # of the hub snapshot
    adapter_folder: Path | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer and template are: beside the adapter if it brings its own."""
        if self.adapter_folder and (self.adapter_folder / "tokenizer_config.json").exists():
            return self.adapter_folder
        return self.folder


def resolve_model(name: str, *, revision: str | None = None, weights: bool = True) -> ModelSource:
    """The files of model `name`; `revision` (branch, tag, commit) is for hub ids only.

    Without `weights` only tokenizer and configs are got from the hub, and no weights are asked for.

    Raises:
        ModelError: nothing there, no access, or files that can't be used.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        source = _from_folder(name, path.resolve(), weights=weights)
    elif path.is_file():
        source = _from_file(name, path.resolve())
    elif _looks_like_path(name):
        raise ModelError("no such file or folder", where=name, hint=_near(path))
    else:
        source = _from_hub(name, revision, weights=weights)
        return source
    if revision is not None:
        raise ModelError(
            "a revision is for models of the hub, this one is on disk",
            where=name,
            hint="leave out model.revision",
        )
    return source


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"can't be read: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise ModelError("is not a JSON object", where=str(path))
    return value


def refuse_foreign_code(source: ModelSource, *, trusted: bool) -> None:
    """Refuse a model whose config asks for Python code of its own, unless that code is trusted.

    Raises:
        ModelError: the code's files, and how to allow them.
    """
    found: Any = read_json(source.folder / "config.json").get("auto_map")
    if trusted or not isinstance(found, dict):
        return
    names = [str(value) for value in found.values() if value]
    modules = sorted({name.split("--")[-1].split(".")[0] + ".py" for name in names})
    if modules:
        raise ModelError(
            f"needs Python code of its own folder ({', '.join(modules)})",
            where=source.name,
            hint="read it, then set model.trust_remote_code=true",
        )


def _from_folder(name: str, folder: Path, *, weights: bool = True) -> ModelSource:
    if (folder / "recipe.yaml").exists():
        if not (folder / "model").is_dir():
            raise ModelError(
                "this run has no model/ yet",
                where=name,
                hint=f"finish it with: tunesmith resume {name}",
            )
        return _from_folder(name, folder / "model", weights=weights)
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        return _from_adapter(name, folder, weights=weights)
    _check_files(name, folder, weights=weights)
    return ModelSource(name, folder)


def _from_adapter(name: str, folder: Path, *, weights: bool) -> ModelSource:
    if weights:
        _check_weights(name, folder)
    check_model_files(folder, weights=weights)
    config = read_json(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(
            "adapter_config.json names no base model",
            where=name,
            hint="set base_model_name_or_path",
        )
    if not Path(base).expanduser().exists() and (folder / base).is_dir():
        base = str(folder / base)
    try:
        found = resolve_model(base, revision=config.get("revision"), weights=weights)
    except ModelError as error:
        raise ModelError(
            f"the adapter's base model: {error.message}",
            where=f"{name} -> {base}",
            hint=error.hint or "set base_model_name_or_path in adapter_config.json",
        ) from error
    if found.adapter_folder is not None:
        raise ModelError(
            "is an adapter on top of another adapter",
            where=name,
            hint="merge the first one and use that",
        )
    return replace(found, name=name, adapter_folder=folder)


def _from_file(name: str, path: Path) -> ModelSource:
    if path.suffix != ".gguf":
        raise ModelError(
            "is a file; a model is a folder in Hugging Face format, a hub id, a run folder or a"
            " .gguf file",
            where=name,
            hint=f"the folder it is in: {path.parent}"
            if (path.parent / "config.json").exists()
            else None,
        )
    from tunesmith.model.gguf import cached_conversion

    return ModelSource(name, cached_conversion(path))


def _check_files(name: str, folder: Path, *, weights: bool) -> None:
    if not (folder / "config.json").exists():
        below = sorted(path.parent.name for path in folder.glob("*/config.json"))
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = "name the folder that holds config.json and *.safetensors"
        if below or ggufs:
            hint = (
                "did you mean "
                + " or ".join(str(Path(name) / found) for found in (below + ggufs)[:3])
                + "?"
            )
        raise ModelError("holds no config.json, so it is no model", where=name, hint=hint)
    if weights:
        _check_weights(name, folder)
    check_model_files(folder, weights=weights)


def _check_weights(name: str, folder: Path) -> None:
    """Refuse a folder without safetensors, since other forms of weights are pickles."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)
    )
    if pickles:
        raise ModelError(
            f"holds weights only as pickles ({pickles[0]}), which can run code when read",
            where=name,
            hint="convert once, where such code may run: "
            "AutoModelForCausalLM.from_pretrained(F).save_pretrained(G)",
        )
    raise ModelError(
        "holds no *.safetensors weights",
        where=name,
        hint="copy the weight files here too, or give the folder that has them",
    )


def _looks_like_path(name: str) -> bool:
    first = Path(name).parts[:1]
    return (
        not _HUB_ID.fullmatch(name)
        or name.endswith((".gguf", ".safetensors", ".bin"))
        or (len(Path(name).parts) > 1 and Path(*first).is_dir())
    )


def _near(path: Path) -> str:
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [entry.name for entry in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(str(parent / match) for match in close) + "?"
    return f"{parent} is there, {path.name} in it is not"


def _from_hub(name: str, revision: str | None, *, weights: bool) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def refused(message: str, hint: str, error: Exception) -> ModelError:
        failure = ModelError(message, where=name, hint=hint)
        failure.__cause__ = error
        return failure

    offline = "check the connection; or give a local folder"
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[one for one in _WANTED if weights or one != _WEIGHTS],
                ignore_patterns=_UNWANTED,
            )
        )
    except GatedRepoError as error:
        raise refused(
            "its owner must grant access first", "ask on its page, then: hf auth login", error
        ) from error
    except RevisionNotFoundError as error:
        raise refused(
            f"has no revision {revision!r}", "leave out model.revision for the newest", error
        ) from error
    except RepositoryNotFoundError as error:
        hint = f"a private one needs: hf auth login; a local folder: {_near(Path(name))}"
        raise refused("is neither a folder here nor a model on the hub", hint, error) from error
    except HFValidationError as error:
        raise refused(
            "is neither a folder here nor a valid hub id", _near(Path(name)), error
        ) from error
    except LocalEntryNotFoundError as error:
        message = "is no folder here, is not in the hub's cache, and the hub can't be reached"
        raise refused(message, offline, error) from error
    except (HfHubHTTPError, OSError) as error:
        raise refused(f"can't be downloaded: {first_line(error)}", offline, error) from error
    commit = folder.name if folder.parent.name == "snapshots" else None
    return replace(_from_folder(name, folder, weights=weights), commit=commit)
