"""Write the example task: everyday sentences, and the calendar command each stands for in JSON.

    python examples/calendar_events.py OUT     # OUT/train.jsonl, 320 rows; OUT/test.jsonl, 80 rows

The same seed writes the same bytes. No sentence and no event (the six values of a command together)
of the test set is in the training set: a model that scores on it has learned format and rules, not
rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
TITLES = (
    "dentist",
    "team meeting",
    "piano lesson",
    "haircut",
    "job interview",
    "yoga class",
    "book club",
    "birthday party",
    "budget review",
    "driving test",
    "parents' evening",
    "vet visit",
    "football training",
    "eye test",
    "lunch",
    "dinner",
    "coffee",
    "choir practice",
    "project kickoff",
    "swimming lesson",
    "garden work",
    "phone call",
    "movie night",
    "car service",
)
PEOPLE = (
    "Anna",
    "Ben",
    "Carla",
    "David",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kim",
    "Lucia",
)
DURATIONS = {
    "20 minutes": 20,
    "half an hour": 30,
    "45 minutes": 45,
    "an hour": 60,
    "one hour": 60,
    "90 minutes": 90,
    "an hour and a half": 90,
    "two hours": 120,
    "three hours": 180,
}
REMINDERS = {"10 minutes": 10, "15 minutes": 15, "half an hour": 30, "an hour": 60, "a day": 1440}
OPENINGS = (
    "",
    "Please add the ",
    "Put down the ",
    "Book the ",
    "Schedule the ",
    "Don't let me forget the ",
)


@dataclass(frozen=True, slots=True)
class Event:
    """The command, in the order of the JSON's keys.

    `start` is always written as in `9:00 pm`; `minutes` is how long it takes; `remind` is minutes
    before.
    """

    title: str
    day: str
    start: str
    minutes: int
    guest: str | None
    remind: int | None

    def command(self) -> str:
        """The event as JSON without spaces, its keys always in the same order."""
        return json.dumps(asdict(self), separators=(",", ":"))


def spoken_time(start: str, rng: random.Random) -> str:
    """One of the ways in which people write a time of day: `9:00 pm`, `9 pm`, `9pm`."""
    clock, half = start.split(" ")
    short = clock.removesuffix(":00")
    return rng.choice([f"{short} {half}", f"{short}{half}", start])


def clock_time(rng: random.Random) -> str:
    """A quarter of an hour between 7 in the morning and 10 at night."""
    hour, minute = rng.randrange(7, 22), rng.choice((0, 15, 30, 45))
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"


def draw(rng: random.Random) -> tuple[str, Event]:
    """A sentence and its event."""
    length, minutes = rng.choice(list(DURATIONS.items()))
    event = Event(
        title=rng.choice(TITLES),
        day=rng.choice(DAYS),
        start=clock_time(rng),
        minutes=minutes,
        guest=rng.choice(PEOPLE) if rng.random() < 0.6 else None,
        remind=None,
    )
    guest = f" with {event.guest}" if event.guest else ""
    when = [f" on {event.day.capitalize()}", f" at {spoken_time(event.start, rng)}"]
    if rng.random() < 0.3:
        when.reverse()
    text = f"{rng.choice(OPENINGS)}{event.title}{guest}{''.join(when)} for {length}."
    if rng.random() < 0.5:
        before, remind = rng.choice(list(REMINDERS.items()))
        text += rng.choice(
            (f" Remind me {before} before.", f" Give me a reminder {before} earlier.")
        )
        event = Event(**{**asdict(event), "remind": remind})
    return text[0].upper() + text[1:], event


def rows(count: int, seed: int) -> Iterator[tuple[dict[str, str], Event]]:
    """`count` rows without a repeated sentence or event, each with its event."""
    rng = random.Random(seed)
    sentences: set[str] = set()
    events: set[Event] = set()
    while len(events) < count:
        sentence, event = draw(rng)
        if sentence in sentences or event in events:
            continue
        sentences.add(sentence)
        events.add(event)
        yield {"prompt": sentence, "completion": event.command()}, event


def write(folder: Path, *, train: int = 320, test: int = 80, seed: int = 7) -> tuple[Path, Path]:
    """Write both files; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [json.dumps(row) for row, _ in rows(train + test, seed)]
    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, lines in zip(paths, (drawn[:train], drawn[train:]), strict=True):
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--train", type=int, default=320, help="training rows (default 320)")
    parser.add_argument("--test", type=int, default=80, help="test rows (default 80)")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same files (default 7)")
    arguments = parser.parse_args()
    for path in write(
        arguments.out, train=arguments.train, test=arguments.test, seed=arguments.seed
    ):
        print(path)


if __name__ == "__main__":
    main()
