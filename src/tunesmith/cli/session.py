"""Loading of a model and its chat template for `chat`, `eval`, `generate` and `score`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.config.overrides import Override
from tunesmith.config.read import read_recipe
from tunesmith.config.schema import Recipe
from tunesmith.display import put
from tunesmith.errors import RecipeError

if TYPE_CHECKING:
    from tunesmith.data.sources.sources import Source
    from tunesmith.data.templates.template import Template
    from tunesmith.model.causal_lm import CausalLM

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Run folder, model folder, hub id or .gguf file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SECTION.KEY=VALUE]...",
        help="Overrides of recipe keys, as in data.columns='prompt: question'.",
        show_default=False,
    ),
]
DataOption = Annotated[
    list[str], typer.Option("--data", help="File with rows. Repeat it for several files.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Largest number of tokens of an answer.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Sampling temperature. 0 is greedy.")
]
TopP = Annotated[
    float, typer.Option("--top-p", help="Nucleus sampling: smallest set of this probability.")
]
Seed = Annotated[int, typer.Option("--seed", help="Random seed of sampling.")]
SpecialAsText = Annotated[
    bool,
    typer.Option(
        "--special-as-text",
        help="Encode special tokens in a message as plain text, where they are an error else.",
    ),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Use only the first rows of each file.")
]

MODEL_KEYS = {"dtype", "quantization", "double_quantization"}
"""Keys of a run's section `model` that must stay as in training, since an adapter fits to them.
Leave to run code of the model's folder is not among them: a run folder may come from anybody, so it
is asked for on the command line of each use.
"""


@dataclass(frozen=True, slots=True)
class Session:
    """A loaded model with its template; `recipe` holds the settings for its use."""

    recipe: Recipe
    model: CausalLM
    template: Template
    raw: bool  # trained without a chat template

    @property
    def device(self) -> Any:
        """The device of the model's weights."""
        return next(self.model.parameters()).device


def read_settings(
    name: str, *, data: Sequence[str] = (), overrides: Sequence[str] = (), limit: int | None = None
) -> Recipe:
    """The settings for using model `name`: those of its run if `name` is a run, then `overrides`.

    Raises:
        RecipeError: an override is not `key=value`, or `read_recipe` refuses a value.
    """
    for item in overrides:
        if "=" not in item:
            hint = "give overrides as section.key=value, and data as --data FILE"
            raise RecipeError(f"{item!r} is one argument too many", hint=hint)
    values = _run_settings(name)
    values["model"] = {**values.get("model", {}), "name": name}
    changes: list[str | Override] = []
    if data:
        sources = [{"path": path, **({"limit": limit} if limit else {})} for path in data]
        changes.append(Override(("data", "train"), sources, "--data"))
    return read_recipe(values, [*changes, *overrides])


def _run_settings(name: str) -> dict[str, Any]:
    """The part of a run's recipe that also holds for other data: columns, template, train_on."""
    path = Path(name).expanduser()
    folder = path.parent if path.name == "model" else path
    if not (folder / "recipe.yaml").is_file():
        return {}
    recipe = read_recipe(folder)
    data = recipe.data.model_dump(
        mode="json",
        include={"columns", "template_kwargs", "train_on", "max_length", "too_long", "bad_rows"},
    )
    if recipe.data.template == "none":
        data["template"] = "none"
    columns = [source.columns for source in recipe.data.train]
    if data["columns"] is None and columns and all(found == columns[0] for found in columns):
        data["columns"] = columns[0]
    model = recipe.model.model_dump(mode="json", include=MODEL_KEYS)
    device = recipe.device.model_dump(mode="json", include={"kind", "micro_tokens", "attention"})
    return {"model": model, "data": data, "device": device}


def open_session(recipe: Recipe) -> Session:
    """Load the model of the settings, and its template with the arguments saved in its folder."""
    from tunesmith.build.device import choose_device
    from tunesmith.build.model import chosen_quantization
    from tunesmith.data.templates.load import load_template
    from tunesmith.export import read_choice
    from tunesmith.model.finite import refuse_non_finite
    from tunesmith.model.load import load_causal_lm, resolve_model

    source = resolve_model(recipe.model.name, revision=recipe.model.revision)
    choice = read_choice(source.adapter_folder or source.folder)
    name, kwargs = recipe.data.template, dict(recipe.data.template_kwargs)
    if choice is not None:
        name = "none" if name is None and choice.raw else name
        kwargs = {**choice.template_kwargs, **kwargs}
    template = load_template(
        source.tokenizer_folder,
        template=name,
        kwargs=kwargs,
        trust_remote_code=recipe.model.trust_remote_code,
        dated=True,
    )
    model = load_causal_lm(
        source,
        dtype=recipe.model.dtype,
        device=choose_device(recipe),
        quantization=chosen_quantization(recipe),
        trust_remote_code=recipe.model.trust_remote_code,
    ).model
    refuse_non_finite(model, recipe.model.name)
    model.eval()
    if recipe.device.attention == "unpacked":
        model.run_unpacked()
    return Session(recipe, model, template, raw=not template.has_chat_template)


def sources_of(recipe: Recipe) -> list[Source]:
    """The data sources of the settings."""
    from tunesmith.build.sources import make_sources

    return make_sources(recipe.data.train, recipe.data)


def print_status(text: str) -> None:
    """Print a status line to stderr, since stdout is for data."""
    put(text, file=sys.stderr, flush=True)
