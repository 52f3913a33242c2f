"""Error reporting of the command line: a message, a hint and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from tunesmith.display import put
from tunesmith.distributed.rank_failure import exit_if_lost, is_told_here
from tunesmith.errors import (
    InputError,
    RecipeError,
    TunesmithError,
    is_out_of_memory,
    out_of_memory,
)

_UsageError: Any = typer.BadParameter.__mro__[1]
"""click's UsageError; its module depends on typer's version, so it is taken from a subclass."""


def run_command(command: Callable[[], Any], arguments: Sequence[str]) -> int:
    """Run the command and return its exit code.

    Only an unexpected exception, which is a bug of this program, keeps its traceback.
    """
    try:
        code = command()
        sys.stdout.flush()
    except TunesmithError as error:
        code = show_error(error) if is_told_here(error) else error.exit_code
        return exit_if_lost(error, code)
    except (KeyboardInterrupt, typer.Abort):
        put("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our stdout has closed it, as `| head` does. Python flushes stdout once more
        # at exit, which must not fail again, so stdout is pointed at /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, OSError, ImportError, RuntimeError) as error:
        if is_out_of_memory(error):
            return show_error(out_of_memory())
        if not isinstance(error, OSError) or error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)[:60]
        return show_error(
            InputError(
                "the name is too long for a file or a folder",
                where=f"{name}…",
                hint="give a folder, a file or section.key=value",
            )
        )
    except _UsageError as error:
        return show_error(_usage_error(error, arguments))
    return code if isinstance(code, int) else 0


def show_error(error: TunesmithError) -> int:
    """Write the error to stderr and return its exit code."""
    put(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _usage_error(error: Any, arguments: Sequence[str]) -> RecipeError:
    context = error.ctx
    command = context.command_path if context else "tunesmith"
    if type(error).__name__ != "NoSuchOption" or context is None:
        message = error.format_message().rstrip(".")
        return RecipeError(message, hint=f"`{command} --help` lists arguments and options")
    options = {name for parameter in context.command.params for name in parameter.opts}
    unknown = [
        (name, _value(arguments, number))
        for number, name in enumerate(arguments)
        if name.startswith("--") and len(name) > 2 and name.split("=")[0] not in options
    ]
    unknown = unknown or [(error.option_name, None)]
    lines = [
        f"there is no option {name.split('=')[0]}: "
        f"{_option_hint(name.split('=')[0], value, options)}"
        for name, value in unknown
    ]
    hint = f"give keys of the recipe as section.key=value; `{command} --help` lists the options"
    return RecipeError("\n  ".join(lines), hint=hint)


def _value(arguments: Sequence[str], number: int) -> str | None:
    _, equals, value = arguments[number].partition("=")
    if equals:
        return value
    following = arguments[number + 1 : number + 2]
    return following[0] if following and not following[0].startswith("--") else None


def _option_hint(name: str, value: str | None, options: set[str]) -> str:
    from tunesmith.config.names import meaning, nearest, suggest

    exact = meaning(name)
    if exact and not exact.note and len(exact.keys) == 1:
        return f"give {exact.keys[0]}={'…' if value is None else value}"
    if exact:
        return str(exact)
    close = nearest(name, options)
    return f"did you mean {close}?" if close else suggest(name) or "no option has a similar name"
