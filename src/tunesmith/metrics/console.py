"""Console progress on standard error: a live line (rich), or plain lines without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

MAX_START_LINES = 12
"""Lines that a start may take."""
LINE_SHARE = 0.05
"""Plain lines: one at least each time this share of the steps has gone by."""
LINE_SECONDS = 10.0
"""Plain lines: one at least this often at first, and each time the run is a twentieth older."""


class ConsoleSink:
    """Shows the records of a run as they come.

    Args:
        total_steps: steps of the whole run.
        done_steps: steps that were done before, on resume.
        console: where to write; standard error by default.
        clock: seconds from any start.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        done_steps: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._clock = clock
        self._console = Console(stderr=True) if console is None else console
        self._first = done_steps
        self._started = self._printed_at = clock()
        self._printed_step: int | None = None
        self._waiting: str | None = None  # the newest status that has not been printed
        self._live: tuple[Progress, TaskID] | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = _progress(self._console, total_steps, done_steps)

    def write(self, record: Mapping[str, Any]) -> None:
        """Show one record: of a train step as the status, of anything else as a line."""
        if record.get("kind") == "train":
            self._show_step(record)
            return
        text = eval_line(record) if record.get("kind") == "eval" else record.get("message")
        if text:
            self.line(str(text))

    def line(self, text: str) -> None:
        """Print a line above the status."""
        if self._waiting is not None:
            _print(self._console, self._waiting)
            self._waiting = None
        _print(self._console, text)

    def close(self) -> None:
        """Leave the last status on the screen and stop."""
        if self._waiting is not None:
            _print(self._console, self._waiting)
            self._waiting = None
        if self._live is not None:
            self._live[0].stop()
            self._live = None

    def _show_step(self, record: Mapping[str, Any]) -> None:
        step, now = int(record["step"]), self._clock()
        left = (now - self._started) / max(1, step - self._first) * (self._total - step)
        text = step_line(record, total_steps=self._total, seconds_left=left)
        if self._live is not None:
            progress, task = self._live
            progress.update(task, completed=step, status=text)
            progress.start()
            return
        if self._is_due(step, now):
            _print(self._console, text)
            self._printed_step, self._printed_at, self._waiting = step, now, None
        else:
            self._waiting = text

    def _is_due(self, step: int, now: float) -> bool:
        if self._printed_step is None or step >= self._total:
            return True
        pause = max(LINE_SECONDS, LINE_SHARE * (now - self._started))
        passed = step - self._printed_step
        return passed >= LINE_SHARE * self._total or now - self._printed_at >= pause


def announce(lines: Sequence[str], *, console: Console | None = None) -> None:
    """Print what was decided before the first step; beyond `MAX_START_LINES` lines are counted."""
    console = Console(stderr=True) if console is None else console
    shown = list(lines)
    if len(shown) > MAX_START_LINES:
        rest = len(shown) - (MAX_START_LINES - 1)
        shown = [*shown[: MAX_START_LINES - 1], f"and {rest} more, in machine.json"]
    for line in shown:
        _print(console, line)


def step_line(record: Mapping[str, Any], *, total_steps: int, seconds_left: float) -> str:
    """The status after a step; values that the record lacks are left out."""
    parts = [f"step {record['step']}/{total_steps}"]
    for name, form in (("loss", "{:.4f}"), ("lr", "{:.2e}")):
        if record.get(name) is not None:
            parts.append(f"{name} {form.format(record[name])}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record["step"] < total_steps:
        parts.append(f"{duration(seconds_left)} left")
    if record.get("peak_memory"):
        parts.append(f"{record['peak_memory'] / 2**30:.1f} GiB")
    return "  ".join(parts)


def eval_line(record: Mapping[str, Any]) -> str:
    """A line on an evaluation: the set's name, its loss and what else is known."""
    parts = [f"step {record['step']}"] if record.get("step") is not None else []
    parts.append(f"eval {record.get('set', '')}".rstrip())
    if record.get("nll") is not None:
        parts.append(f"loss {record['nll']:.4f}")
    if record.get("perplexity") is not None:
        parts.append(f"perplexity {record['perplexity']:.4g}")
    if record.get("accuracy") is not None:
        parts.append(f"token accuracy {record['accuracy']:.1%}")
    if record.get("target_tokens") is not None:
        parts.append(f"{record['target_tokens']:,} targets")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`0:07`, `12:03` or `1:02:03`."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _progress(console: Console, total: int, done: int) -> tuple[Progress, TaskID]:
    progress = Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.fields[status]}", markup=False),
        console=console,
    )
    return progress, progress.add_task("train", total=total, completed=done, status="")


def _print(console: Console, text: str) -> None:
    # soft_wrap: a log file's line must not be broken at a width it doesn't have.
    console.print(text, soft_wrap=True, markup=False, highlight=False)
