"""`tunesmith chat`: conversation with a model in the terminal, with streamed answers."""

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
    print_status,
    read_settings,
)
from tunesmith.display import put
from tunesmith.errors import DataError, RecipeError

CONVERSATION = "the conversation"
COMMANDS = "/reset starts a new conversation, /exit ends the program"


def chat(
    model: ModelArgument,
    overrides: Overrides = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this prompt and exit.")
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
            "this model was trained without a chat template, so it has no system messages",
            where="--system",
            hint="put the text at the beginning of the prompt",
        )
    conversation = Conversation(session, options, system, special_as_text=special_as_text)
    if prompt is not None:
        conversation.answer(prompt)
        return
    _talk(conversation)


class Conversation:
    """The turns so far. A model without a chat template gets only the last one, as plain text."""

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
        """Remove all turns but the system message."""
        self.messages = list(self.start)

    def answer(self, text: str) -> None:
        """Print the answer to `text` and keep the turn, unless generation fails or is interrupted.

        Raises:
            DataError: the context has no room for an answer, or the text has a special token.
        """
        from tunesmith.generate import stream

        turns = [*self.messages, {"role": "user", "content": text}]
        ids = self._prompt_ids(turns)
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
            put(flush=True)
        if not generation.stopped:
            print_status(f"(cut off after {len(generation.ids)} tokens)")
        self.messages = [*turns, {"role": "assistant", "content": generation.text}]
        self.turns += 1

    def _prompt_ids(self, turns: list[dict[str, str]]) -> tuple[int, ...]:
        """The ids of the turns, up to the beginning of the answer."""
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
                hint = "--special-as-text encodes it as plain text"
            raise DataError(error.fault.message, where=CONVERSATION, hint=hint) from error
        return prompt.ids


def _show(piece: str) -> None:
    put(piece, end="", flush=True)


def _talk(conversation: Conversation) -> None:
    """Read and answer lines until /exit or the end of input."""
    terminal = sys.stdin.isatty()
    if terminal:
        raw = "no chat template: each line is a separate prompt"
        kind = raw if conversation.session.raw else "chat"
        print_status(f"{conversation.session.recipe.model.name} ({kind}). {COMMANDS}.")
    for line in _lines(terminal):
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            conversation.reset()
            print_status("(new conversation)")
        elif line.startswith("/") and " " not in line and terminal:
            print_status(f"there is no command {line}: {COMMANDS}")
        elif line.strip():
            _answer(conversation, line, terminal)


def _answer(conversation: Conversation, line: str, terminal: bool) -> None:
    try:
        conversation.answer(line)
    except DataError as error:
        if not terminal:
            raise
        in_prompt = error.where == CONVERSATION
        print_status(f"{error.message}; {error.hint if in_prompt else '/reset frees the context'}")
    except KeyboardInterrupt:
        if not terminal:
            raise
        print_status("(interrupted)")


def _lines(terminal: bool) -> Iterator[str]:
    if not terminal:
        for line in sys.stdin:
            yield line.rstrip("\r\n")
        return
    with suppress(ImportError):  # not available on every system
        import_module("readline")  # importing it gives input() line editing and a history

    while True:
        try:
            yield input("> ")
        except EOFError:
            put()
            return
