"""Upload of an exported folder to the Hugging Face hub: chosen files only, private by default."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from tunesmith.errors import ModelError, RunError
from tunesmith.export.local_paths import is_local, local_texts
from tunesmith.model.model_files import LICENSES
from tunesmith.model.source import read_json

ALLOWED = (
    "README.md", "Modelfile", "config.json", "generation_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "tunesmith.json",
    "adapter_config.json", "adapter_model*.safetensors",
    "model*.safetensors", "model.safetensors.index.json", "*.gguf", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
    *LICENSES,
)  # fmt: skip
"""What may leave this machine. Rows, the ledger, metrics, samples and checkpoints are not here."""
_CHECKED_TEXTS = ("config", "generation_config", "adapter_config", "tunesmith", "tokenizer_config")
NAMED_TEMPLATES = "additional_chat_templates"
"""The folder in which transformers keeps every chat template but the one named default."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_name(name: str) -> None:
    """Refuse what is no ORG/NAME.

    Raises:
        ModelError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise ModelError("is no name on the hub", where=name, hint="give ORG/NAME")


def check_base(adapter: Path | None) -> None:
    """Refuse an adapter whose base is a folder of this machine, which nobody else has.

    Raises:
        ModelError: it is.
    """
    if adapter is None:
        return
    base = str(read_json(adapter / "adapter_config.json").get("base_model_name_or_path"))
    if is_local(base) or Path(base).expanduser().exists():
        raise ModelError(
            f"this adapter's base is a folder of this machine ({base}), which nobody else has",
            where=str(adapter),
            hint="push the merged model: --to hf; or train it with the base's name on the hub",
        )


def _check_texts(folder: Path, files: Sequence[str]) -> None:
    for name in files:
        if name.endswith(".json") and name.startswith(_CHECKED_TEXTS):
            found = local_texts(read_json(folder / name))
            if found:
                raise ModelError(
                    f"holds a path of this machine: {found[0]}",
                    where=str(folder / name),
                    hint="take it out of the file, then push again",
                )


def files_to_push(folder: Path) -> list[str]:
    """The names of the folder's own files that may be sent, named chat templates included; other
    subfolders and links are left out.
    """
    found = [path for path in folder.iterdir() if is_allowed(path.name)]
    named = folder / NAMED_TEMPLATES
    if named.is_dir() and not named.is_symlink():
        found += named.glob("*.jinja")
    return sorted(
        path.relative_to(folder).as_posix()
        for path in found
        if path.is_file() and not path.is_symlink()
    )


def is_allowed(name: str) -> bool:
    """Whether a file of this name may leave this machine."""
    return any(fnmatch(name, pattern) for pattern in ALLOWED)


def push(folder: Path, name: str, *, public: bool = False) -> str:
    """Send the allowed files as a model called `name`, and return its address.

    Raises:
        ModelError: no name, or nothing to send.
        RunError: the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_name(name)
    files = files_to_push(folder)
    if not files:
        raise ModelError("holds nothing that may be pushed", where=str(folder))
    _check_texts(folder, files)
    api = HfApi()
    try:
        created = api.create_repo(name, repo_type="model", private=not public, exist_ok=True)
        if not public and not api.model_info(name).private:
            raise ModelError(
                "exists already and is public", where=name, hint="another name, or --public"
            )
        api.upload_folder(
            repo_id=name,
            repo_type="model",
            folder_path=folder,
            allow_patterns=files,
            commit_message="Upload model",
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RunError(f"can't be pushed: {error}", where=name, hint="hf auth login") from error
    return str(created)
