"""Console progress on stderr: a live progress bar (rich), or plain lines without a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from tunesmith.display import shown, unfailing

MAX_START_LINES = 12
"""Largest number of lines that are printed at the start."""
LINE_SHARE = 0.05
"""Without a terminal a line is printed at least once in this share of the steps."""
LINE_SECONDS = 10.0
"""Without a terminal a line is printed at least this often at first. The interval grows to
LINE_SHARE of the run's age, so that a long run has a short log.
"""


class ConsoleSink:
    """Prints the metric records of a run.

    Args:
        total_steps: steps of the whole run.
        done_steps: steps of the run before a resume.
        console: a rich console; by default on stderr.
        clock: seconds since any fixed moment.
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
        self._console = _stderr() if console is None else console
        self._first = done_steps
        self._started = self._printed_at = clock()
        self._printed_step: int | None = None
        self._pending: str | None = None  # the newest status, if it has not been printed
        self._live: tuple[Progress, TaskID] | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = _progress(self._console, total_steps, done_steps)

    def write(self, record: Mapping[str, Any]) -> None:
        """Show one record: a train step as the status, an evaluation or a message as a line."""
        if record.get("kind") == "train":
            self._show_step(record)
            return
        text = eval_line(record) if record.get("kind") == "eval" else record.get("message")
        if text:
            self.line(str(text))

    def line(self, text: str) -> None:
        """Print a line above the status."""
        if self._pending is not None:
            _print(self._console, self._pending)
            self._pending = None
        _print(self._console, text)

    def close(self) -> None:
        """Print the last status and stop the progress bar."""
        if self._pending is not None:
            _print(self._console, self._pending)
            self._pending = None
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
            self._printed_step, self._printed_at, self._pending = step, now, None
        else:
            self._pending = text

    def _is_due(self, step: int, now: float) -> bool:
        if self._printed_step is None or step >= self._total:
            return True
        pause = max(LINE_SECONDS, LINE_SHARE * (now - self._started))
        passed = step - self._printed_step
        return passed >= LINE_SHARE * self._total or now - self._printed_at >= pause


def announce(lines: Sequence[str], *, console: Console | None = None) -> None:
    """Print the lines on what was chosen before the first step, `MAX_START_LINES` at most."""
    console = _stderr() if console is None else console
    shown = list(lines)
    if len(shown) > MAX_START_LINES:
        rest = len(shown) - (MAX_START_LINES - 1)
        shown = [*shown[: MAX_START_LINES - 1], f"{rest} more lines are in machine.json"]
    for line in shown:
        _print(console, line)


def step_line(record: Mapping[str, Any], *, total_steps: int, seconds_left: float) -> str:
    """The status after a step, from the values that the record has."""
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
    """A line on an evaluation: the name of the set, its loss and its other metrics."""
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
    """Seconds as text: `0:07`, `12:03` or `1:02:03`."""
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


def _stderr() -> Console:
    return Console(file=unfailing(sys.stderr))


def _print(console: Console, text: str) -> None:
    # soft_wrap: rich would break lines at 80 characters in a log file, which has no width.
    console.print(shown(text), soft_wrap=True, markup=False, highlight=False)
