"""`tunesmith chat`: talk with a model, answers shown as they are written."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import Annotated, Any

import typer

from tunesmith.cli.session import (
    MaxNewTokens,
    ModelArgument,
    Overrides,
    Seed,
    Session,
    SpecialAsText,
    Temperature,
    TopP,
    open_session,
    read_settings,
    tell,
)
from tunesmith.errors import DataError, RecipeError

CONVERSATION = "the conversation"
COMMANDS = "/reset forgets the conversation, /exit ends"


def chat(
    model: ModelArgument,
    overrides: Overrides = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this alone and end.")
    ] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    special_as_text: SpecialAsText = False,
) -> None:
    from tunesmith.generate import Options

    options = Options(max_new_tokens, temperature, top_p, seed)
    session = open_session(read_settings(model, overrides=overrides or ()))
    if session.raw and system is not None:
        raise RecipeError(
            "this model was trained raw, so it knows no system message",
            where="--system",
            hint="put the text at the beginning of the prompt",
        )
    conversation = Conversation(session, options, system, special_as_text=special_as_text)
    if prompt is not None:
        conversation.answer(prompt)
        return
    _talk(conversation)


class Conversation:
    """The turns so far. A model trained raw sees the last one alone, as plain text."""

    def __init__(
        self, session: Session, options: Any, system: str | None, *, special_as_text: bool = False
    ) -> None:
        self.session = session
        self.options = options
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)
        self.turns = 0
        self.special_as_text = special_as_text

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self.start)

    def answer(self, text: str) -> None:
        """Print the answer to `text`; where that fails or is interrupted, the turn is forgotten.

        Raises:
            DataError: the context has no room for an answer, or the text holds a control token.
        """
        from tunesmith.generate import stream

        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self._ask(turns)
        options = self.options
        try:
            generation = stream(
                self.session.model,
                self.session.template,
                ids,
                _show,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed + self.turns,
            )
        finally:
            print(flush=True)
        if not generation.stopped:
            tell(f"(cut off after {len(generation.ids)} tokens)")
        self.messages = [*turns, {"role": "assistant", "content": generation.text}]
        self.turns += 1

    def _ask(self, turns: list[dict[str, str]]) -> tuple[int, ...]:
        """Ids of the turns up to where the answer begins."""
        from tunesmith.data.formats.examples import Chat, Message, Text
        from tunesmith.data.row_errors import RowError
        from tunesmith.generate import prompt_from

        messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
        example = Text(turns[-1]["content"]) if self.session.raw else Chat(messages)
        try:
            prompt = prompt_from(
                example, self.session.template, special_as_text=self.special_as_text
            )
        except RowError as error:
            hint = error.fault.hint or ""
            if error.fault.kind == "special-token-in-content":
                hint = "--special-as-text reads it as plain characters; or write it otherwise"
            raise DataError(error.fault.message, where=CONVERSATION, hint=hint) from error
        return prompt.ids


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


def _talk(conversation: Conversation) -> None:
    """Line by line until /exit or the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        kind = "raw: each line is a prompt of its own" if conversation.session.raw else "chat"
        tell(f"{conversation.session.recipe.model.name} ({kind}). {COMMANDS}.")
    for line in _lines(terminal):
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            conversation.reset()
            tell("(forgotten)")
        elif line.startswith("/") and " " not in line and terminal:
            tell(f"no command {line}: {COMMANDS}")
        elif line.strip():
            _answer(conversation, line, terminal)


def _answer(conversation: Conversation, line: str, terminal: bool) -> None:
    try:
        conversation.answer(line)
    except DataError as error:
        if not terminal:
            raise
        asked = error.where == CONVERSATION
        tell(f"{error.message}; {error.hint if asked else '/reset makes room'}")
    except KeyboardInterrupt:
        if not terminal:
            raise
        tell("(interrupted)")


def _lines(terminal: bool) -> Iterator[str]:
    if not terminal:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):  # not on every system
        import_module("readline")  # makes input() editable, with a history

    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
