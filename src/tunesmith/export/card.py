"""The model card (README.md in Hugging Face's format): data, recipe, results, and how to load
it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ModelError
from tunesmith.export.local_paths import is_local, public_name, public_yaml
from tunesmith.model.source import CHOICE_FILE
from tunesmith.version import __version__

_LICENCE = (
    "## Licence\n\nThat of the base model applies; see its page. "
    "The training data may add terms of its own."
)


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """`template` is "own" (the chat template in the model's folder) or "none" (trained raw)."""

    template: str = "own"
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def raw(self) -> bool:
        """True if the model was trained without a chat template."""
        return self.template == "none"


@dataclass(frozen=True, slots=True)
class DataEntry:
    """One source of the training data; `content_hash` is None for rows given in memory."""

    name: str
    rows: int
    content_hash: str | None = None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the card says; `recipe` is the resolved recipe as YAML text."""

    base_model: str
    base_commit: str | None = None
    data: Sequence[DataEntry] = ()
    choice: TemplateChoice = field(default_factory=TemplateChoice)
    recipe: str = ""
    metrics: Mapping[str, float | int] = field(default_factory=dict[str, float | int])

    @property
    def base_is_local(self) -> bool:
        """True if the base is a folder or file of this machine."""
        return is_local(self.base_model) or Path(self.base_model).expanduser().exists()

    @property
    def base_name(self) -> str:
        """The base by the name that may leave this machine."""
        return Path(self.base_model).name if self.base_is_local else self.base_model


def read_choice(folder: Path) -> TemplateChoice | None:
    """The choice kept in a model folder, None where the folder was not written by us.

    Raises:
        ModelError: the file is there and can't be understood.
    """
    path = folder / CHOICE_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return TemplateChoice(str(values["template"]), dict(values["template_kwargs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"can't be understood: {error}", where=str(path), hint="export the model again"
        ) from error


def card_text(card: ModelCard, *, title: str, adapter: bool) -> str:
    """The card as Markdown with YAML front matter."""
    parts = [
        _front_matter(card, adapter),
        f"# {title}",
        _origin(card, adapter),
        _data(card.data),
        _metrics(card.metrics),
        _template(card.choice),
        _loading(card, title, adapter),
        _serving(card, title, adapter),
        _recipe(card.recipe),
        _LICENCE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(card: ModelCard, adapter: bool) -> str:
    # a folder of this machine is no model of the hub, which would refuse the card for it
    base: dict[str, Any] = {
        "base_model": card.base_model,
        "base_model_relation": "adapter" if adapter else "finetune",
    }
    values: dict[str, Any] = {
        **({} if card.base_is_local else base),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", "sft", *(["adapter"] if adapter else [])],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _origin(card: ModelCard, adapter: bool) -> str:
    at = f" at commit `{card.base_commit}`" if card.base_commit else ""
    what = "An adapter for" if adapter else "A fine-tuned version of"
    how = f"made by supervised fine-tuning with Tunesmith {__version__}"
    return f"{what} `{card.base_name}`{at}, {how}."


def _data(entries: Sequence[DataEntry]) -> str:
    if not entries:
        return ""
    lines = ["## Data", "", "| source | rows | content hash |", "|---|---:|---|"]
    for entry in entries:
        lines.append(
            f"| `{_cell(public_name(entry.name))}` | {entry.rows} | `{entry.content_hash or '-'}` |"
        )
    return "\n".join(lines)


def _metrics(metrics: Mapping[str, float | int]) -> str:
    if not metrics:
        return ""
    lines = ["## Final metrics", "", "| metric | value |", "|---|---:|"]
    for name, value in metrics.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        lines.append(f"| {_cell(name)} | {shown} |")
    return "\n".join(lines)


def _template(choice: TemplateChoice) -> str:
    if choice.raw:
        text = (
            "Trained raw, no chat template: a prompt is given as plain text "
            "and the completion follows it directly."
        )
    else:
        text = "Trained with the chat template in this folder."
        if choice.template_kwargs:
            kwargs = json.dumps(dict(choice.template_kwargs), ensure_ascii=False)
            text += f" Its arguments in training, to be given at inference too: `{kwargs}`."
    return f"## Prompt format\n\n{text}"


def _loading(card: ModelCard, title: str, adapter: bool) -> str:
    if adapter:
        load = (
            "from peft import AutoPeftModelForCausalLM\n"
            "from transformers import AutoTokenizer\n\n"
            f"model = AutoPeftModelForCausalLM.from_pretrained({title!r})\n"
        )
    else:
        load = (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained({title!r}, dtype="auto")\n'
        )
    if card.choice.raw:
        ask = 'inputs = tokenizer("...", return_tensors="pt")\n'
    else:
        kwargs = "".join(
            f", {name}={value!r}" for name, value in card.choice.template_kwargs.items()
        )
        ask = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            f'    messages, add_generation_prompt=True, return_tensors="pt"{kwargs}\n'
            ")\n"
        )
    return (
        f"## Use\n\n```python\n{load}tokenizer = AutoTokenizer.from_pretrained({title!r})\n{ask}"
        "output = model.generate(**inputs, max_new_tokens=256)\n"
        'answer = output[0, inputs["input_ids"].shape[1]:]\n'
        "print(tokenizer.decode(answer, skip_special_tokens=True))\n```"
    )


def _serving(card: ModelCard, title: str, adapter: bool) -> str:
    if adapter:
        line = "tunesmith export RUN --to hf   # merged, then serve the folder"
    else:
        line = f"vllm serve {shlex.quote(title)}"
        if not card.choice.raw and card.choice.template_kwargs:
            kwargs = json.dumps(dict(card.choice.template_kwargs), ensure_ascii=False)
            line += f"   # each request with chat_template_kwargs: {kwargs}"
    return f"## Serve\n\n```sh\n{line}\n```"


def _recipe(text: str) -> str:
    return f"## Recipe\n\n```yaml\n{public_yaml(text).strip()}\n```" if text.strip() else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
