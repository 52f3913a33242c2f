"""Command line (typer): the `tunesmith` command and its subcommands.

Only the module of the subcommand in use is imported, so that `tunesmith --help` starts fast.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import typer

from tunesmith.cli.errors import run_command, show_error
from tunesmith.display import put, unfailing_stderr
from tunesmith.errors import RecipeError
from tunesmith.version import __version__


class Command(NamedTuple):
    """A subcommand: the module and function that run it, its heading and its line in the help."""

    module: str
    function: str
    panel: str
    help: str


BEFORE, RUN, AFTER, TOOLS = "Before a run", "Run", "After a run", "Tools"

COMMANDS = {
    "init": Command("init", "init", BEFORE, "Write a commented starter recipe."),
    "doctor": Command(
        "doctor", "doctor", BEFORE, "Check the data before a run: faults, duplicates, leaks."
    ),
    "preview": Command(
        "preview", "preview", BEFORE, "Show which tokens of the data the model will learn."
    ),
    "score": Command(
        "score", "score", BEFORE, "Compute the loss and the difficulty of each row under a model."
    ),
    "select": Command("select", "select", BEFORE, "Write the rows that rules keep to a new file."),
    "convert": Command("convert", "convert", BEFORE, "Convert rows of other formats to messages."),
    "plan": Command("plan", "plan", BEFORE, "Estimate the memory and the time of a run."),
    "bench": Command("bench", "bench", BEFORE, "Measure the speed of a run on this machine."),
    "verify": Command(
        "verify", "verify", BEFORE, "Check promises P1 to P6 on your model, data and machine."
    ),
    "launch": Command("launch", "launch", BEFORE, "Write the files that start a run on a cluster."),
    "train": Command("train", "train", RUN, "Fine-tune a model on demonstrations."),
    "resume": Command("train", "resume", RUN, "Continue a run from its newest checkpoint."),
    "replay": Command(
        "replay", "replay", AFTER, "Repeat one step of a run and show the loss of each document."
    ),
    "eval": Command("eval", "evaluate", AFTER, "Measure a model on data: loss and exact match."),
    "chat": Command("chat", "chat", AFTER, "Chat with a model or with the result of a run."),
    "generate": Command("generate", "generate", AFTER, "Answer the prompts of a file in batches."),
    "merge": Command("export", "merge", AFTER, "Merge adapters into their base model."),
    "export": Command("export", "export", AFTER, "Export a model: hf, adapter, gguf or ollama."),
    "schema": Command("init", "schema", TOOLS, "Print the JSON Schema of the recipe."),
}

CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers of libraries whose warnings a user can't act on, such as kernels for other machines."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong input."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(COMMANDS)}"
        return show_error(RecipeError(f"there is no command {name}", hint=hint))
    for library in CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)
    with unfailing_stderr():
        return run_command(lambda: _dispatch(name, arguments), arguments)


def _dispatch(name: str | None, arguments: list[str]) -> Any:
    app = _build(name)
    return app(args=arguments or ["--help"], prog_name="tunesmith", standalone_mode=False)


def _build(name_in_use: str | None) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_options)
    for name, command in COMMANDS.items():
        # `--help` lists all commands, but only the one in use needs its options, and its imports.
        function = _load(command) if name == name_in_use else _listed_only
        app.command(name, help=command.help, rich_help_panel=command.panel)(function)
    return app


def _load(command: Command) -> Callable[..., Any]:
    return getattr(import_module(f"tunesmith.cli.{command.module}"), command.function)


def _listed_only() -> None:
    """Placeholder of a command that is listed in the help and not run."""


def _show_version(wanted: bool) -> None:
    if wanted:
        put(f"tunesmith {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Supervised fine-tuning (SFT) of language models, with checks against silent errors."""
