from __future__ import annotations

import io

import pytest
from rich.console import Console

from tunesmith.metrics.console import ConsoleSink, announce, duration, eval_line, step_line


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def record(step, **fields):
    return {
        "kind": "train",
        "step": step,
        "loss": 1.25,
        "lr": 1e-4,
        "tokens_per_second": 1234.4,
        "peak_memory": 3 * 2**30,
        **fields,
    }


def plain(total, **options):
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, force_terminal=False, width=40)
    return ConsoleSink(total, console=console, clock=clock, **options), clock, out


def steps_of(out):
    return [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]


def run(sink, clock, steps, seconds):
    for step in steps:
        clock.now += seconds
        sink.write(record(step))


def test_a_line_has_everything_and_is_not_wrapped():
    sink, clock, out = plain(100)
    run(sink, clock, [1], 2.0)
    expected = "step 1/100  loss 1.2500  lr 1.00e-04  1,234 tokens/s  3:18 left  3.0 GiB\n"
    assert out.getvalue() == expected


def test_plain_lines_are_first_every_twentieth_and_last():
    sink, clock, out = plain(100)
    run(sink, clock, range(1, 101), 0.1)
    sink.close()
    assert steps_of(out) == [*range(1, 97, 5), 100]


def test_slow_steps_show_after_ten_seconds_and_old_runs_more_rarely():
    sink, clock, out = plain(10_000)
    run(sink, clock, range(1, 101), 4.0)
    assert steps_of(out)[:4] == [1, 4, 7, 10]
    assert steps_of(out)[-1] - steps_of(out)[-2] >= 5


def test_the_last_status_is_shown_when_a_run_stops_early():
    sink, clock, out = plain(100)
    run(sink, clock, [1, 2, 3], 0.1)
    assert steps_of(out) == [1]
    sink.close()
    sink.close()
    assert steps_of(out) == [1, 3]


def test_a_resumed_run_counts_time_from_its_own_start():
    sink, clock, out = plain(100, done_steps=90)
    run(sink, clock, [91, 92], 1.0)
    assert "0:09 left" in out.getvalue()


def test_evaluations_and_events_are_lines_in_order():
    sink, clock, out = plain(100)
    run(sink, clock, [1, 2], 0.1)
    sink.write({"kind": "eval", "step": 2, "set": "dev", "nll": 0.5, "target_tokens": 1200})
    sink.write({"kind": "event", "step": 2, "event": "checkpoint", "message": "saved [step-2]"})
    sink.write({"kind": "event", "step": 2, "event": "silent"})
    lines = out.getvalue().splitlines()
    assert [line[:8] for line in lines] == ["step 1/1", "step 2/1", "step 2  ", "saved [s"]
    assert lines[2] == "step 2  eval dev  loss 0.5000  1,200 targets"


def test_a_terminal_gets_one_live_line():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    sink = ConsoleSink(3, console=console)
    for step in (1, 2, 3):
        sink.write(record(step))
    sink.write({"kind": "event", "message": "a line above"})
    sink.close()
    text = out.getvalue()
    assert "step 3/3" in text
    assert "a line above" in text
    assert "\x1b[" in text


def test_a_dumb_terminal_gets_plain_lines():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, _environ={"TERM": "dumb"}, color_system=None)
    sink = ConsoleSink(3, console=console)
    sink.write(record(1))
    assert out.getvalue().startswith("step 1/3")


@pytest.mark.parametrize("count", [3, 12, 13, 30])
def test_a_start_takes_at_most_twelve_lines(count):
    out = io.StringIO()
    announce([f"line {i} [{i}]" for i in range(count)], console=Console(file=out, width=20))
    lines = out.getvalue().splitlines()
    assert len(lines) == min(count, 12)
    assert lines[2] == "line 2 [2]"
    if count > 12:
        assert lines[-1] == f"{count - 11} more lines are in machine.json"


def test_a_step_without_some_values_shows_the_others():
    text = step_line({"step": 5, "loss": None, "lr": 1e-3}, total_steps=5, seconds_left=0)
    assert text == "step 5/5  lr 1.00e-03"
    assert eval_line({"set": "a", "nll": 1.0, "accuracy": 0.5, "perplexity": 2.718281828}) == (
        "eval a  loss 1.0000  perplexity 2.718  token accuracy 50.0%"
    )


def test_durations():
    assert [duration(s) for s in (7, 723, 3723, -1)] == ["0:07", "12:03", "1:02:03", "0:00"]
