"""The corpus of the checks: rows with their messages and their rendered documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from tunesmith.data.formats.examples import (
    Chat,
    Completion,
    Example,
    Message,
    Parts,
    TemplatedText,
    Text,
)
from tunesmith.data.rendering.render import Rendered
from tunesmith.data.row_errors import Fault, Field
from tunesmith.data.templates.template import Template
from tunesmith.doctor.minhash import plain, words_of
from tunesmith.types import Document, Origin

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Case:
    """One row. `whole` is its document without a limit of length, `rendered` what is trained on.

    `example` is None where the row has no readable shape; `fault` says why it can't be learned.
    `length` counts the tokens of its longest path, without a limit; 0 where there is a fault.
    `section` numbers its source in the recipe.
    """

    origin: Origin
    example: Example | None
    whole: Document | None = None
    rendered: Rendered | None = None
    fault: Fault | None = None
    length: int = 0
    over_long: bool = False
    section: int = 0
    fields: tuple[Field, ...] = ()  # those that nothing reads, that were renamed or are ignored

    @property
    def messages(self) -> tuple[Message, ...]:
        """The turns of a chat, none of anything else."""
        return self.example.messages if isinstance(self.example, Chat) else ()

    def texts(self) -> Iterator[tuple[str, str]]:
        """What the row says, part by part: where it says so, and the text."""
        if isinstance(self.example, Completion):
            yield "prompt", self.example.prompt
            yield "completion", self.example.completion
        elif isinstance(self.example, Text):
            yield "text", self.example.text
        for number, message in enumerate(self.messages):
            place = f"message {number} ({message.role})"
            if message.content:
                yield place, message.content
            for value in message.fields.values():
                if isinstance(value, str) and value:
                    yield place, value

    @cached_property
    def key(self) -> str:
        """What the row says as one text, without the differences that don't count."""
        said = (plain(text) for _, text in self.texts())
        return "\0".join([*said, *self._calls(), self.tools])

    @property
    def tools(self) -> str:
        """The tools of the row as one text; with others it is another task."""
        return str(self.example.tools or "") if isinstance(self.example, Chat) else ""

    @cached_property
    def words(self) -> list[str]:
        """The row's own words: no system prompt, which rows share, and no tool results."""
        if not self.messages:
            return words_of("\n".join(text for _, text in self.texts()))
        said = [m.content or "" for m in self.messages if m.role in ("user", ASSISTANT)]
        return words_of("\n".join([*said, *self._calls()]))

    def _calls(self) -> list[str]:
        calls = (message.fields.get("tool_calls") for message in self.messages)
        return [str(call) for call in calls if call]

    def trained_messages(self) -> frozenset[int]:
        """Numbers of the messages with targets in the whole document; empty where there is none."""
        if self.whole is None:
            return frozenset()
        return frozenset(
            int(message) for segment in self.whole.segments for message in set(segment.message)
        )


@dataclass(frozen=True)
class Answer:
    """A text to be learned and the text that asks for it; `question` is the last turn before it."""

    origin: Origin
    number: int | None  # of the message in a chat
    question: str
    context: str  # everything before the answer
    text: str

    @cached_property
    def words(self) -> list[str]:
        """The answer in words."""
        return words_of(self.text)

    @property
    def where(self) -> str:
        """`file:row` of the answer."""
        return str(self.origin)


@dataclass(frozen=True)
class Corpus:
    """The rows that are trained on and the named held-out sets."""

    train: Sequence[Case]
    held_out: Mapping[str, Sequence[Case]] = field(default_factory=dict[str, "Sequence[Case]"])

    @cached_property
    def cases(self) -> list[Case]:
        """All rows, trained ones first."""
        return [*self.train, *(case for cases in self.held_out.values() for case in cases)]

    @cached_property
    def answers(self) -> list[Answer]:
        """Everything that is learned from the training rows, as text."""
        return [answer for case in self.train for answer in answers_of(case)]


@dataclass(frozen=True, slots=True)
class Setup:
    """What the data is trained with, as far as checks ask.

    `stops_named` are the ids at which generation ends by generation_config.json or, without one,
    config.json; None where the model's folder has neither. `model_jinja` is the chat template of
    the model's folder.
    """

    template: Template
    max_length: int | None = None
    too_long: str = "error"
    bad_rows: str = "error"
    vocabulary: int | None = None
    stops_named: frozenset[int] | None = None
    model_jinja: str | None = None
    total_steps: int | None = None


def answers_of(case: Case) -> list[Answer]:
    """The trained answers of a row that say something; all answers of a row with a fault.

    A plain text is an answer to nothing.
    """
    example = case.example
    if isinstance(example, Completion):
        return [Answer(case.origin, None, example.prompt, example.prompt, example.completion)]
    if isinstance(example, Text | TemplatedText):
        return [Answer(case.origin, None, "", "", example.text)]
    if isinstance(example, Parts):
        learned = "".join(text for text, train in example.parts if train)
        return [Answer(case.origin, None, "", "", learned)]
    trained = case.trained_messages()
    found: list[Answer] = []
    said: list[str] = []
    question = ""
    for number, message in enumerate(case.messages):
        content = message.content or ""
        if message.role == ASSISTANT and content.strip() and (case.fault or number in trained):
            found.append(Answer(case.origin, number, question, "\n".join(said), content))
        said.append(f"{message.role}: {content}")
        if message.role != ASSISTANT:
            question = content
    return found
