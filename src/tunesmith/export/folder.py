"""Write the model folder of a run: files in a temporary folder, then one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.data.templates.template import Template
from tunesmith.errors import RunError
from tunesmith.export import readers
from tunesmith.export.card import ModelCard, card_text
from tunesmith.export.hub import NAMED_TEMPLATES
from tunesmith.export.weights import write_adapter, write_weights
from tunesmith.model.adapters.initialization import OF_QUANTIZED
from tunesmith.model.adapters.state import AdapterState
from tunesmith.model.causal_lm import CausalLM
from tunesmith.model.model_files import COPIED, refuse_links
from tunesmith.model.source import CHOICE_FILE, ModelSource
from tunesmith.version import __version__

TOKENIZER_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "*.model", "*.model.v*", "*.tiktoken", "chat_template.json", "*.jinja",
    "tokenization_*.py",
)  # fmt: skip
MODEL_FILES = (
    "config.json", "generation_config.json", "*processor_config.json", *COPIED,
)  # fmt: skip
SUBFOLDER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""What a model's subfolders hold for its processor, as `additional_chat_templates`."""


def write_model(
    model: CausalLM,
    template: Template,
    source: ModelSource | None,
    out: Path,
    *,
    card: ModelCard,
    adapter: AdapterState,
    extra_stop_ids: Iterable[int] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write `out`: the full model or its adapter, with all that inference needs beside it.

    Tokenizer, template and configuration files are the base model's own, byte for byte where
    nothing has to be put in. `source` is None for a model the user had in memory. `adapter` is what
    attaching or merging the adapter returned. `dtype` rounds the weights of a full model; None
    writes them as they were trained. A folder `out` that exists is replaced, and is whole at every
    instant.

    Raises:
        RunError: the folder can't be written.
    """
    temporary = out.with_name(f".{out.name}.writing")
    stop_ids = sorted({*template.stop_ids, *extra_stop_ids})
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _fill(temporary, model, template, source, adapter=adapter, stop_ids=stop_ids, dtype=dtype)
        adapted = _is_adapter(model)
        _write_text(temporary / "README.md", card_text(card, title=_title(out), adapter=adapted))
        choice = _choice(card, adapted)
        if adapted and adapter.of_quantized:
            choice[OF_QUANTIZED] = True
        _write_json(temporary / CHOICE_FILE, choice)
        _publish(temporary, out)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors reports a full disk with an error class of its own.
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise RunError(
                f"the model can't be written: {error}",
                where=str(out),
                hint="free disk space, then: tunesmith resume",
            ) from error
        raise


def _fill(
    folder: Path,
    model: CausalLM,
    template: Template,
    source: ModelSource | None,
    *,
    adapter: AdapterState,
    stop_ids: list[int],
    dtype: torch.dtype | None,
) -> None:
    if source is None:
        _save_in_memory(folder, model, template)
    else:
        _copy(source.tokenizer_folder, folder, TOKENIZER_FILES)
        if template.has_chat_template and template.jinja is None:
            # The model has several templates, and the rows chose among them as inference does.
            named = source.tokenizer_folder / NAMED_TEMPLATES
            _copy(named, folder / NAMED_TEMPLATES, ("*.jinja",))
        # The generation config beside an adapter may hold stop ids that its base lacks.
        _copy(source.folder, folder, MODEL_FILES)
        copy_subfolders(source.folder, folder)
        if source.tokenizer_folder != source.folder:
            _copy(source.tokenizer_folder, folder, ("generation_config.json",))
    config_path = folder / "config.json"
    config = _read_json(config_path) or {}
    generation_path = folder / "generation_config.json"
    _update(
        generation_path,
        readers.complete_generation_config(_read_json(generation_path), config, stop_ids),
    )
    add_tokens(folder, template)
    _update_template(folder, template)
    if _is_adapter(model):
        config_path.unlink(missing_ok=True)
        write_adapter(
            model,
            adapter,
            folder,
            base=base_name(model, source),
            revision=source.commit if source else None,
        )
        return
    stated = config.get("text_config") or config
    if template.added or stated.get("vocab_size") != model.config.get_text_config().vocab_size:
        config = complete_rows(config, model.base.get_input_embeddings().weight.shape[0])
    base = None if source is None else source.folder
    written = write_weights(model.base, folder, base=base, dtype=dtype)
    if adapter.untied:
        config = {**config, "tie_word_embeddings": False}
    quantized = bool(getattr(model.base, "is_quantized", False))
    _update(config_path, readers.complete_config(config, dtype=written, quantized=quantized))


def base_name(model: CausalLM, source: ModelSource | None) -> str:
    """What an adapter names as its base: a hub id as it is, a folder by its full path."""
    if source is None:
        return str(getattr(model.config, "_name_or_path", "") or "")
    if source.adapter_folder is not None:
        config = _read_json(source.adapter_folder / "adapter_config.json") or {}
        named = str(config.get("base_model_name_or_path") or "")
        return (
            named if named and not (source.adapter_folder / named).is_dir() else str(source.folder)
        )
    return str(source.folder) if Path(source.name).expanduser().exists() else source.name


def _is_adapter(model: CausalLM) -> bool:
    return hasattr(model.model, "peft_config")


def _save_in_memory(folder: Path, model: CausalLM, template: Template) -> None:
    """Files of a model that has no folder, as the installed transformers writes them."""
    config = model.config.to_dict()
    config["use_cache"] = True
    config["architectures"] = [type(model.base).__name__]
    _write_json(folder / "config.json", config)
    generation = getattr(model.base, "generation_config", None)
    if generation is not None:
        _write_json(folder / "generation_config.json", generation.to_diff_dict())
    template.save(folder)


def _update_template(folder: Path, template: Template) -> None:
    """Put the template where every reader looks: its own file and tokenizer_config.json."""
    text = template.tokenizer.chat_template if template.jinja is None else template.jinja
    if isinstance(text, Mapping):
        text = text.get("default")
    path = folder / "tokenizer_config.json"
    config = _read_json(path)
    file = folder / "chat_template.jinja"
    if (
        text is not None
        and (_read_text(file) if file.exists() else _template_inside(config)) != text
    ):
        _write_text(file, text)
        (folder / "chat_template.json").unlink(missing_ok=True)
    if config is not None:
        _update(path, readers.complete_tokenizer_config(config, text))


def _template_inside(config: Mapping[str, Any] | None) -> Any:
    found = (config or {}).get("chat_template")
    if isinstance(found, list):
        return {entry.get("name"): entry.get("template") for entry in found}.get("default")
    return found


def _choice(card: ModelCard, adapter: bool) -> dict[str, Any]:
    return {
        "tunesmith": __version__,
        "base_model": card.base_name,
        "kind": "adapter" if adapter else "model",
        "template": card.choice.template,
        "template_kwargs": dict(card.choice.template_kwargs),
    }


def _title(out: Path) -> str:
    """`model` says nothing; the run's name does."""
    out = out.absolute()
    return out.parent.name if out.name == "model" and out.parent.name else out.name


def _copy(source: Path, target: Path, patterns: Iterable[str]) -> None:
    patterns = tuple(patterns)
    refuse_links(source, patterns)
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not path.name.endswith(".index.json"):
                target.mkdir(exist_ok=True)
                shutil.copyfile(path, target / path.name)


def copy_subfolders(source: Path, target: Path) -> None:
    """The small files in the subfolders of a model. A subfolder that is a run, a checkpoint or a
    model of its own stays behind.
    """
    for place in sorted(path for path in source.iterdir() if path.is_dir()):
        is_run = any((place / name).exists() for name in ("recipe.yaml", "manifest.json"))
        weights = any(place.glob("*.safetensors")) or any(place.glob("*.bin"))
        wanted = [p for pattern in SUBFOLDER_FILES for p in place.glob(pattern) if p.is_file()]
        if is_run or weights or not wanted or place.name.startswith("."):
            continue
        refuse_links(source, [place.name])
        refuse_links(place, SUBFOLDER_FILES)
        (target / place.name).mkdir(exist_ok=True)
        for path in wanted:
            shutil.copyfile(path, target / place.name / path.name)


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any] | None:
    return json.loads(_read_text(path)) if path.is_file() else None


def _update(path: Path, values: Mapping[str, Any]) -> None:
    """Write the object, unless the file says it already: then its bytes stay."""
    if _read_json(path) != values:
        _write_json(path, values)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _publish(temporary: Path, out: Path) -> None:
    """Bring the files to the disk, then give the folder its name."""
    # safetensors makes its files readable for their owner only; all get what the umask leaves
    usual = (temporary / CHOICE_FILE).stat().st_mode & 0o777
    for path in temporary.glob("*.safetensors"):
        path.chmod(usual)
    for path in [*temporary.iterdir(), temporary]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    temporary.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def complete_rows(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """config.json with the number of rows that the embedding has."""
    text = config.get("text_config")
    if isinstance(text, Mapping) and "vocab_size" in text:
        return {**config, "text_config": {**text, "vocab_size": rows}}
    return {**config, "vocab_size": rows}


def add_tokens(folder: Path, template: Template) -> None:
    """Put the tokens and names that the template brought along into the tokenizer's files.

    What else stands in them stays as it is; where there is no tokenizer.json, the tokenizer is
    written as the installed transformers writes it.
    """
    if not template.added and not template.named:
        return
    path = folder / "tokenizer.json"
    if not path.is_file():
        template.save(folder)
        return
    entries = {
        token.id: {
            "content": token.text,
            "single_word": token.single_word,
            "lstrip": token.lstrip,
            "rstrip": token.rstrip,
            "normalized": token.normalized,
            "special": token.special,
        }
        for token in template.added
    }
    tokenizer: dict[str, Any] = json.loads(_read_text(path))
    tokenizer["added_tokens"] += [{"id": number, **entry} for number, entry in entries.items()]
    _write_json(path, tokenizer)
    _update_tokens(folder / "tokenizer_config.json", entries, template.named)
    _update_tokens(folder / "special_tokens_map.json", {}, template.named)
    beside = folder / "added_tokens.json"
    if beside.is_file():
        known: dict[str, int] = json.loads(_read_text(beside))
        _write_json(beside, known | {token.text: token.id for token in template.added})


def _update_tokens(
    path: Path, entries: Mapping[int, dict[str, Any]], named: Mapping[str, str]
) -> None:
    if not path.is_file():
        return
    config: dict[str, Any] = json.loads(_read_text(path))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(n): entry for n, entry in entries.items()}
    _write_json(path, config | dict(named))
