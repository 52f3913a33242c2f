"""The `tunesmith` command. Only the module of the command that is asked for is imported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import typer

from tunesmith.cli.errors import run_command, show_error
from tunesmith.errors import RecipeError
from tunesmith.version import __version__


class Command(NamedTuple):
    """Where a command's function is, under which heading help lists it, and its one line there."""

    module: str
    function: str
    panel: str
    help: str


BEFORE, RUN, AFTER, TOOLS = "Before a run", "Run", "After a run", "Tools"

COMMANDS = {
    "init": Command("init", "init", BEFORE, "Write a commented starter recipe."),
    "doctor": Command(
        "doctor", "doctor", BEFORE, "Examine the data before a run: faults, duplicates, leaks."
    ),
    "preview": Command(
        "preview", "preview", BEFORE, "Show what will be learned from the data, token by token."
    ),
    "score": Command(
        "score", "score", BEFORE, "Give each row its loss and difficulty under a model."
    ),
    "select": Command("select", "select", BEFORE, "Keep rows by rules, as a new data set."),
    "convert": Command("convert", "convert", BEFORE, "Write rows of another format as messages."),
    "plan": Command("plan", "plan", BEFORE, "Say what a run will take: memory, time, work."),
    "bench": Command("bench", "bench", BEFORE, "Measure the speed of a run on this machine."),
    "verify": Command(
        "verify", "verify", BEFORE, "Prove the promises on your model, data and machine."
    ),
    "launch": Command("launch", "launch", BEFORE, "Write the files that start a run on a cluster."),
    "train": Command("train", "train", RUN, "Fine-tune a model on demonstrations."),
    "resume": Command("train", "resume", RUN, "Go on with a run from its newest checkpoint."),
    "replay": Command(
        "replay", "replay", AFTER, "Take a step of a run again and show each document's loss."
    ),
    "eval": Command("eval", "evaluate", AFTER, "Measure a model on data: loss and exact match."),
    "chat": Command("chat", "chat", AFTER, "Talk with a model or the result of a run."),
    "generate": Command("generate", "generate", AFTER, "Answer prompts of a file in batches."),
    "merge": Command("export", "merge", AFTER, "Merge adapters into their base."),
    "export": Command(
        "export", "export", AFTER, "Write the result as hf, adapter, gguf or ollama."
    ),
    "schema": Command("init", "schema", TOOLS, "Print the JSON schema of the recipe."),
}

CHATTY = ("torchao", "torch.utils._pytree")
"""Loggers of libraries that warn of things a user can't act on: kernels for other machines."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(sys.argv[1:] if arguments is None else list(arguments)))


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong input."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        return show_error(RecipeError(f"no command {name}", hint=hint))
    for library in CHATTY:
        logging.getLogger(library).setLevel(logging.ERROR)
    return run_command(lambda: _dispatch(name, arguments), arguments)


def _dispatch(name: str | None, arguments: list[str]) -> Any:
    app = _build(name)
    return app(args=arguments or ["--help"], prog_name="tunesmith", standalone_mode=False)


def _build(asked: str | None) -> typer.Typer:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")
    app.callback()(_options)
    for name, command in COMMANDS.items():
        function = _load(command) if name == asked else _listed_only
        app.command(name, help=command.help, rich_help_panel=command.panel)(function)
    return app


def _load(command: Command) -> Callable[..., Any]:
    return getattr(import_module(f"tunesmith.cli.{command.module}"), command.function)


def _listed_only() -> None:
    """Stands in the list of commands for one that was not asked for."""


def _show_version(asked: bool) -> None:
    if asked:
        print(f"tunesmith {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_show_version
    ),
) -> None:
    """Supervised fine-tuning of language models that cannot be silently wrong."""
