"""Exception classes of errors that a user can meet: what happened, where, and a hint to fix it."""

from __future__ import annotations

from tunesmith.display import shown
from tunesmith.redact import redact


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class TunesmithError(Exception):
    """An error that the command line shows as `message`, `where` and `hint`, not as a traceback.

    `where` is the place of the error for the user: `data/train.jsonl:17`, `recipe.yaml:4 optim.lr`,
    or a folder.
    """

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return shown(redact(f"{text}\nhint: {self.hint}" if self.hint else text))


class InputError(TunesmithError):
    """The input is wrong, and nothing was trained. Exit code 2."""

    exit_code = 2


class RecipeError(InputError):
    """The recipe, an override or a command-line option is wrong."""


class DataError(InputError):
    """A data source, a row, or its rendering by the chat template is wrong."""


class ModelError(InputError):
    """The model, its architecture, tokenizer or template does not support the request."""


class RunError(TunesmithError):
    """A run failed after it had started. Exit code 1."""


class CheckpointError(RunError):
    """A checkpoint can't be written or is damaged."""


class NonFiniteError(RunError):
    """A loss or gradient became NaN or infinite."""


class InterruptedRun(TunesmithError):
    """A signal stopped the run after it had saved a checkpoint.

    Exit code 128 + signal number: 130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP.
    """

    def __init__(self, message: str, *, signal_number: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number


_NO_ROOM = (
    "Cannot allocate memory", "cannot allocate memory", "can't allocate memory",
    "failed to map segment", "can't start new thread",
)  # fmt: skip
"""What the system, its loader, torch and Python say where a process gets no more memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """True if the operating system refused memory, by a limit or because there is none."""
    return isinstance(error, MemoryError) or any(part in str(error) for part in _NO_ROOM)


def out_of_memory() -> RunError:
    """The error for it, where nothing smaller can be tried."""
    return RunError(
        "the operating system gives this process no more memory",
        hint="see `ulimit -a` and the limits of the job or container; libraries alone take some "
        "GiB of addresses",
    )
