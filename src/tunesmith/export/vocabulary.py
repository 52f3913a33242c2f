"""Added tokens in the tokenizer files of an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.data.templates.template import Template


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
    tokenizer = _read(path)
    tokenizer["added_tokens"] += [{"id": number, **entry} for number, entry in entries.items()]
    _write(path, tokenizer)
    _update(folder / "tokenizer_config.json", entries, template.named)
    _update(folder / "special_tokens_map.json", {}, template.named)
    beside = folder / "added_tokens.json"
    if beside.is_file():
        _write(beside, _read(beside) | {token.text: token.id for token in template.added})


def _update(path: Path, entries: Mapping[int, dict[str, Any]], named: Mapping[str, str]) -> None:
    if not path.is_file():
        return
    config = _read(path)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(n): entry for n, entry in entries.items()}
    _write(path, config | dict(named))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
